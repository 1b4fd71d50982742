//! Which modules of a model get an adapter.
