//! Machines: VMM processes, their cgroups and files, and the connection to their guests.
