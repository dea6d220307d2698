//! Which machine and container serves a request, and how many wait ready.
