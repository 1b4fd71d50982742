//! One case on disk: its description, its tensors, its tolerances; and the judgement of a difference.

use std::path::{Path, PathBuf};

use lora_parity::{Failure, Report};
use lora_torch::{Torch, Weights};
use serde_json::Value;
use tch::{Kind, Tensor};

/// One folder with `case.json` and `tensors.safetensors`.
pub(crate) struct Case {
    pub folder: PathBuf,
    pub config: Value,
    tolerance: Value,
    tensors: Option<Weights>,
}

impl Case {
    pub(crate) fn open(folder: &Path, name: &str) -> Result<Self, Failure> {
        let folder = folder.join(name);
        let path = folder.join("case.json");
        let text = std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let mut case: Value = serde_json::from_slice(&text)?;
        let tensors = folder.join("tensors.safetensors");
        let tensors = if tensors.is_file() { Some(Weights::open(&[tensors])?) } else { None };
        Ok(Self { config: case["config"].take(), tolerance: case["tolerance"].take(), folder, tensors })
    }

    /// A tensor, floats as f32.
    pub(crate) fn tensor(&self, name: &str) -> Result<Tensor, Failure> {
        let weights = self.tensors.as_ref().ok_or("the case has no tensors")?;
        let shape = weights.shape(name).ok_or_else(|| format!("the case has no tensor `{name}`"))?;
        Ok(weights.root(&Torch::CPU).tensor(name, &shape)?)
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.as_ref().is_some_and(|weights| weights.shape(name).is_some())
    }

    /// All names that end so, without their ends.
    pub(crate) fn stems(&self, end: &str) -> Vec<String> {
        let names = self.tensors.iter().flat_map(|weights| weights.names());
        names.filter_map(|name| Some(name.strip_suffix(end)?.to_owned())).collect()
    }

    /// A part of the configuration as a typed value.
    pub(crate) fn typed<T: serde::de::DeserializeOwned>(&self, key: &str) -> Result<T, Failure> {
        serde_json::from_value(self.config[key].clone()).map_err(|error| format!("config.{key}: {error}").into())
    }

    /// How far a result may be from the expected one; names may hold `*` or `<something>` for any text.
    pub(crate) fn tolerance(&self, name: &str) -> Result<Tolerance, Failure> {
        let rules = self.tolerance.as_object().ok_or("the case states no tolerance")?;
        let (_, rule) = rules
            .iter()
            .find(|(pattern, _)| *pattern == name)
            .or_else(|| rules.iter().find(|(pattern, _)| *pattern == "all" || matches(pattern, name)))
            .ok_or_else(|| format!("the case states no tolerance for `{name}`"))?;
        let number = |key: &str| rule[key].as_f64();
        Ok(Tolerance {
            atol: number("atol"),
            rtol: number("rtol"),
            relative_to_max: number("relative_to_max"),
            relative_l2: number("relative_l2_per_tensor"),
            mean_abs: number("mean_abs"),
        })
    }

    /// Judges a tensor under the tolerance that is stated for `name`.
    pub(crate) fn close(
        &self,
        report: &mut Report,
        name: &str,
        got: &Tensor,
        expected: &Tensor,
    ) -> Result<(), Failure> {
        let (error, allowed) = difference(self.tolerance(name)?, got, expected)?;
        report.push(name, error, allowed);
        Ok(())
    }

    /// Judges an 8-bit picture under the mean absolute difference that is stated for `name`.
    pub(crate) fn same_picture(
        &self,
        report: &mut Report,
        name: &str,
        got: &[u8],
        expected: &[u8],
    ) -> Result<(), Failure> {
        let allowed = self.tolerance(name)?.mean_abs.ok_or("a picture needs `mean_abs`")?;
        if got.len() != expected.len() || got.is_empty() {
            return Err(format!("{name}: {} bytes, expected {}", got.len(), expected.len()).into());
        }
        let sum: f64 = got.iter().zip(expected).map(|(got, expected)| f64::from(got.abs_diff(*expected))).sum();
        report.push(name, sum / 255.0 / got.len() as f64, allowed);
        Ok(())
    }
}

/// Whether a name fits a pattern in which `*` and `<something>` stand for any text.
fn matches(pattern: &str, name: &str) -> bool {
    let Some(start) = pattern.find(['*', '<']) else { return pattern == name };
    let end = match pattern[start..].find('>') {
        Some(close) if pattern[start..].starts_with('<') => start + close + 1,
        _ => start + 1,
    };
    let Some(rest) = name.strip_prefix(&pattern[..start]) else { return false };
    (0..=rest.len()).any(|at| rest.is_char_boundary(at) && matches(&pattern[end..], &rest[at..]))
}

/// What a fixture allows.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tolerance {
    atol: Option<f64>,
    rtol: Option<f64>,
    relative_to_max: Option<f64>,
    relative_l2: Option<f64>,
    mean_abs: Option<f64>,
}

/// The error and what is allowed for it, of the element or measure that used most of its tolerance.
fn difference(tolerance: Tolerance, got: &Tensor, expected: &Tensor) -> Result<(f64, f64), Failure> {
    if got.size() != expected.size() {
        return Err(format!("shape {:?}, expected {:?}", got.size(), expected.size()).into());
    }
    let host = |tensor: &Tensor| tensor.f_detach()?.f_to_device(tch::Device::Cpu)?.f_to_kind(Kind::Double);
    let (got, expected) = (host(got)?, host(expected)?);
    let error = got.f_sub(&expected)?.f_abs()?;
    let largest = |tensor: &Tensor| tensor.f_max()?.f_double_value(&[]);
    let mut worst: Option<(f64, f64)> = None;
    let mut judge = |error: f64, allowed: f64| {
        let used = |(error, allowed): (f64, f64)| if error.is_nan() { f64::INFINITY } else { error / allowed };
        if worst.is_none_or(|worst| used((error, allowed)) > used(worst)) {
            worst = Some((error, allowed));
        }
    };
    if tolerance.atol.is_some() || tolerance.rtol.is_some() {
        let allowed = expected
            .f_abs()?
            .f_mul_scalar(tolerance.rtol.unwrap_or(0.0))?
            .f_add_scalar(tolerance.atol.unwrap_or(0.0))?;
        let at = error.f_div(&allowed)?.f_flatten(0, -1)?.f_argmax(0, false)?.f_int64_value(&[])?;
        let pick = |tensor: &Tensor| tensor.f_flatten(0, -1)?.f_double_value(&[at]);
        judge(pick(&error)?, pick(&allowed)?);
    }
    if let Some(share) = tolerance.relative_to_max {
        judge(largest(&error)?, share * largest(&expected.f_abs()?)?);
    }
    if let Some(share) = tolerance.relative_l2 {
        let norm = |tensor: &Tensor| tensor.f_norm()?.f_double_value(&[]);
        judge(norm(&error)?, share * norm(&expected)?);
    }
    if let Some(allowed) = tolerance.mean_abs {
        judge(error.f_mean(Kind::Double)?.f_double_value(&[])?, allowed);
    }
    worst.ok_or_else(|| "the tolerance holds no number".into())
}
