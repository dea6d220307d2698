//! The agent of one host: stokerd, its command line and a small controller
