//! What needs several processes: see the files beside this one.
