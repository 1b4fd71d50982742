//! Ranges of numbers that types cannot say.

use super::ConfigError;

pub(super) fn finite(option: &'static str, value: f64) -> Result<f64, ConfigError> {
    check(option, value, value.is_finite(), "it must be a finite number")
}

pub(super) fn above_zero(option: &'static str, value: f64) -> Result<f64, ConfigError> {
    check(option, value, value.is_finite() && value > 0.0, "it must be above 0")
}

pub(super) fn not_below_zero(option: &'static str, value: f64) -> Result<f64, ConfigError> {
    check(option, value, value.is_finite() && value >= 0.0, "it must be 0 or above")
}

pub(super) fn share(option: &'static str, value: f64) -> Result<f64, ConfigError> {
    check(option, value, (0.0..=1.0).contains(&value), "it is a share, 0 to 1")
}

pub(super) fn share_below_one(option: &'static str, value: f64) -> Result<f64, ConfigError> {
    check(option, value, (0.0..1.0).contains(&value), "it must be at least 0 and below 1")
}

fn check(option: &'static str, value: f64, holds: bool, reason: &str) -> Result<f64, ConfigError> {
    if holds { Ok(value) } else { Err(ConfigError::invalid(option, value, reason)) }
}
