//! The suite that every backend runs: `suite::backend_suite!(name, backend, tolerance)` makes one test of each property.
//!
//! Values are made on the host from a seed and judged against [`Cpu`](lora_core::Cpu); shapes shrink, values follow. Other
//! crates of the workspace include this folder by path and run the same suite on their backend.

pub(crate) mod cases;
pub(crate) mod families;
pub(crate) mod operations;
pub(crate) mod starts;
#[allow(dead_code, reason = "only the crate of the reference runs it")]
pub(crate) mod sturdiness;

/// Every property of the suite, and agreement with the reference, in a module of that name: one `#[test]` each.
///
/// The tolerance is the largest error allowed, relative to the largest value that was expected (or to 1, if that is
/// larger).
#[allow(unused_macros, reason = "a crate may have no backend but the reference")]
macro_rules! backend_suite {
    ($name:ident, $backend:expr, $tolerance:expr) => {
        mod $name {
            use crate::suite::{operations, starts};

            #[test]
            fn operations_match_the_reference() {
                operations::match_the_reference(&$backend, $tolerance);
            }

            #[test]
            fn fresh_factors_match_the_reference() {
                starts::match_the_reference(&$backend, $tolerance);
            }

            crate::suite::properties!($backend, $tolerance);
            crate::suite::each_family!(agreement, $backend, $tolerance);
        }
    };
}

/// The properties that the reference itself has: everything but agreement with it. It alone meets strangers' factors.
#[allow(unused_macros, reason = "only the crate of the reference runs them alone")]
macro_rules! reference_suite {
    ($name:ident, $backend:expr, $tolerance:expr) => {
        mod $name {
            use crate::suite::{operations, starts};

            crate::suite::properties!($backend, $tolerance);
            crate::suite::each_family!(sturdiness, $backend, $tolerance);
        }
    };
}

macro_rules! properties {
    ($backend:expr, $tolerance:expr) => {
        #[test]
        fn misfits_are_errors() {
            operations::refuse_misfits(&$backend);
        }

        #[test]
        fn a_fresh_adapter_changes_nothing_and_can_learn() {
            starts::change_nothing(&$backend, $tolerance);
        }

        #[test]
        fn families_that_only_load_have_no_start() {
            starts::are_refused_where_nothing_trains(&$backend);
        }

        crate::suite::each_family!(behaviour, $backend, $tolerance);
    };
}

macro_rules! each_family {
    ($what:ident, $backend:expr, $tolerance:expr) => {
        crate::suite::each_family!(@each $what, $backend, $tolerance, [
            lora, lora_with_bias, lora_with_start, tucker, dora_over_lora, dora_over_started_lora, dora_over_tucker,
            dora_over_loha, dora_over_lokr, loha, tucker_loha, lokr_whole, lokr_product, lokr_two_products, lokr_tucker,
            glora, older_glora, full, ia3_offset, ia3_factor, oft_rows, oft_bounded_rows, oft_columns_exact,
            oft_columns_neumann, oft_columns_shared, boft
        ]);
    };
    (@each $what:ident, $backend:expr, $tolerance:expr, [$($family:ident),*]) => {
        mod $what {
            $(
                mod $family {
                    #[allow(unused_imports, reason = "not every kind of test runs a property of the families")]
                    use crate::suite::{cases::$family as family, families};

                    crate::suite::each_family!(@ $what, $backend, $tolerance);
                }
            )*
        }
    };
    (@ behaviour, $backend:expr, $tolerance:expr) => {
        #[test]
        fn adapted_equals_merged_at_every_strength() {
            families::adapted_equals_merged(&$backend, $tolerance, family);
        }

        #[test]
        fn strength_zero_leaves_every_bit_of_the_base() {
            families::strength_zero_changes_nothing(&$backend, family);
        }
    };
    (@ sturdiness, $backend:expr, $tolerance:expr) => {
        #[test]
        fn factors_of_any_shape_give_a_result_or_an_error() {
            crate::suite::sturdiness::any_shape_gives_a_result_or_an_error(&$backend, family);
        }
    };
    (@ agreement, $backend:expr, $tolerance:expr) => {
        #[test]
        fn merging_matches_the_reference() {
            families::merge_matches_the_reference(&$backend, $tolerance, family);
        }
    };
}

#[allow(unused_imports, reason = "a crate runs one of the two suites")]
pub(crate) use {backend_suite, each_family, properties, reference_suite};
