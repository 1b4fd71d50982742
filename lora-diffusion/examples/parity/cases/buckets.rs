//! Picture sizes and the buckets that they go to.

use std::{collections::BTreeMap, fs};

use lora_diffusion::data::BucketRule;
use lora_parity::{Failure, Report};
use serde_json::Value;

use super::fixture::Case;

pub(super) fn run(case: &Case, report: &mut Report) -> Result<(), Failure> {
    let table: BTreeMap<String, Vec<Vec<Value>>> = serde_json::from_slice(&fs::read(case.folder.join("table.json"))?)?;
    for (setting, rows) in table {
        let settings = &case.config["settings"][&setting];
        let rule = rule(settings)?;
        let buckets: Option<Vec<[u32; 2]>> = serde_json::from_value(settings["buckets"].clone())?;
        if let Some(buckets) = buckets {
            report.equal(&format!("buckets of {setting}"), &rule.buckets(), &buckets);
        }
        for row in rows {
            let number = |at: usize| row.get(at).and_then(Value::as_f64).map(|number| number as u32);
            let (Some(width), Some(height)) = (number(0), number(1)) else { return Err("a row without a size".into()) };
            let got = rule.fit([width, height]).ok().map(|fit| [fit.bucket, fit.resized, fit.cut, fit.crop].concat());
            // A row with an error is a picture that the peer stops at, or fails on later.
            let error = row.get(10).is_some_and(|error| !error.is_null());
            let wanted = if error { None } else { Some((2..10).filter_map(number).collect::<Vec<_>>()) };
            report.equal(&format!("{setting}: {width} × {height}"), &[got], &[wanted]);
        }
    }
    Ok(())
}

fn rule(settings: &Value) -> Result<BucketRule, Failure> {
    let number = |key: &str| settings[key].as_u64().ok_or_else(|| format!("no {key}"));
    Ok(BucketRule {
        resolution: number("resolution")? as u32,
        min: number("min")? as u32,
        max: number("max")? as u32,
        step: number("step")? as u32,
        no_upscale: settings["no_upscale"].as_bool().ok_or("no no_upscale")?,
    })
}
