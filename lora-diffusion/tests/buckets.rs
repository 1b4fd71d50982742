//! The bucket rule against sd-scripts: 63 picture sizes under five settings (`fixtures/buckets`).

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::{collections::BTreeMap, fs, path::Path};

use lora_diffusion::data::BucketRule;
use serde_json::Value;

fn read(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/buckets").join(name);
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn rule(settings: &Value) -> BucketRule {
    let number = |key: &str| settings[key].as_u64().unwrap() as u32;
    BucketRule {
        resolution: number("resolution"),
        min: number("min"),
        max: number("max"),
        step: number("step"),
        no_upscale: settings["no_upscale"].as_bool().unwrap(),
    }
}

#[test]
fn every_size_goes_where_sd_scripts_puts_it() {
    let case = read("case.json");
    let table: BTreeMap<String, Vec<Vec<Value>>> = serde_json::from_value(read("table.json")).unwrap();
    assert_eq!(table.len(), 5);
    for (setting, rows) in table {
        let rule = rule(&case["config"]["settings"][&setting]);
        for row in rows {
            let numbers: Vec<Option<u32>> = row[..10].iter().map(|v| v.as_f64().map(|v| v as u32)).collect();
            let size = [numbers[0].unwrap(), numbers[1].unwrap()];
            match (rule.fit(size), row[10].as_str()) {
                (Ok(fit), None) => {
                    let got = [fit.bucket, fit.resized, fit.cut, fit.crop].concat();
                    let wanted: Vec<u32> = numbers[2..].iter().map(|number| number.unwrap()).collect();
                    assert_eq!(got, wanted, "{setting}: {size:?}");
                }
                (Err(_), Some(_)) => {}
                (got, wanted) => panic!("{setting}: {size:?} gives {got:?}, sd-scripts {wanted:?}"),
            }
        }
    }
}

#[test]
fn the_list_of_buckets_is_that_of_sd_scripts() {
    let case = read("case.json");
    for (name, settings) in case["config"]["settings"].as_object().unwrap() {
        let wanted: Vec<[u32; 2]> = serde_json::from_value(settings["buckets"].clone()).unwrap_or_default();
        assert_eq!(rule(settings).buckets(), wanted, "{name}");
    }
}
