//! Empty on purpose: `diffusers` 0.3.1 names `torch-sys` 0.13 only to pass features on.
