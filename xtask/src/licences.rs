//! Licences, sources and banned crates of all dependencies, read from `deny.toml`.
//!
//! The file is cargo-deny's. That program takes minutes to compile, which a check on a bare machine should not cost; so
//! the three questions that need no database are answered here, over `cargo metadata`. The fourth, advisories, is
//! cargo-deny's alone: `cargo deny check advisories`.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::shell;

/// Fails with one line for each dependency that breaks a rule.
pub(crate) fn check() -> Result<()> {
    let text = std::fs::read_to_string(shell::root()?.join("deny.toml")).context("cannot read deny.toml")?;
    let rules = Rules::parse(&text)?;
    let mut metadata = shell::cargo()?;
    metadata.args(["metadata", "--format-version", "1", "--locked"]);
    for target in &rules.targets {
        metadata.args(["--filter-platform", target]);
    }
    let metadata: Value = serde_json::from_str(&shell::output(&mut metadata)?).context("cargo metadata is not JSON")?;
    let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    let faults: Vec<String> = packages.iter().flat_map(|package| rules.faults(package)).collect();
    if !faults.is_empty() {
        bail!("{} of {} packages\n   {}", faults.len(), packages.len(), faults.join("\n   "));
    }
    println!("   {} packages, licences within {} allowed ones", packages.len(), rules.licences.len());
    Ok(())
}

/// The part of `deny.toml` that is understood here.
#[derive(Debug, Default)]
struct Rules {
    targets: Vec<String>,
    licences: BTreeSet<String>,
    registries: BTreeSet<String>,
    banned: BTreeSet<String>,
}

impl Rules {
    fn parse(text: &str) -> Result<Self> {
        let file: toml::Table = text.parse().context("deny.toml")?;
        let list = |section: &str, key: &str| -> Vec<String> {
            let values = file.get(section).and_then(|section| section.get(key)).and_then(toml::Value::as_array);
            let named = |value: &toml::Value| match value {
                toml::Value::Table(table) => table.get("crate").and_then(toml::Value::as_str).map(str::to_owned),
                other => other.as_str().map(str::to_owned),
            };
            values.into_iter().flatten().filter_map(named).collect()
        };
        let rules = Self {
            targets: list("graph", "targets"),
            licences: list("licenses", "allow").into_iter().collect(),
            registries: list("sources", "allow-registry").into_iter().collect(),
            banned: list("bans", "deny").into_iter().collect(),
        };
        if rules.licences.is_empty() || rules.registries.is_empty() {
            bail!("deny.toml must list licenses.allow and sources.allow-registry");
        }
        Ok(rules)
    }

    /// What is wrong with one package of `cargo metadata`.
    fn faults(&self, package: &Value) -> Vec<String> {
        let name = package["name"].as_str().unwrap_or_default();
        let version = package["version"].as_str().unwrap_or_default();
        let mut faults = Vec::new();
        match package["license"].as_str() {
            None => faults.push(format!("{name} {version}: names no licence")),
            Some(licence) => match allowed(licence, &self.licences) {
                Some(true) => {}
                Some(false) => faults.push(format!("{name} {version}: licence `{licence}` is not allowed")),
                None => faults.push(format!("{name} {version}: licence `{licence}` cannot be read")),
            },
        }
        if let Some(source) = package["source"].as_str()
            && !source.strip_prefix("registry+").is_some_and(|registry| self.registries.contains(registry))
        {
            faults.push(format!("{name} {version}: comes from `{source}`"));
        }
        if self.banned.contains(name) {
            faults.push(format!("{name} {version}: is banned"));
        }
        faults
    }
}

/// Whether a licence expression (SPDX 2.3, annex D, and the old `A/B`) can be met with the allowed licences; `None` if
/// it cannot be read.
fn allowed(expression: &str, licences: &BTreeSet<String>) -> Option<bool> {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let mut words = spaced.split_whitespace().peekable();
    let met = either(&mut words, licences)?;
    words.next().is_none().then_some(met)
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn either(words: &mut Words<'_>, licences: &BTreeSet<String>) -> Option<bool> {
    let mut met = both(words, licences)?;
    while words.next_if_eq(&"OR").is_some() {
        met |= both(words, licences)?;
    }
    Some(met)
}

fn both(words: &mut Words<'_>, licences: &BTreeSet<String>) -> Option<bool> {
    let mut met = single(words, licences)?;
    while words.next_if_eq(&"AND").is_some() {
        met &= single(words, licences)?;
    }
    Some(met)
}

fn single(words: &mut Words<'_>, licences: &BTreeSet<String>) -> Option<bool> {
    let word = words.next()?;
    if word == "(" {
        let met = either(words, licences)?;
        return (words.next()? == ")").then_some(met);
    }
    if matches!(word, ")" | "OR" | "AND" | "WITH") {
        return None;
    }
    if words.next_if_eq(&"WITH").is_some() {
        return Some(licences.contains(&format!("{word} WITH {}", words.next()?)));
    }
    Some(licences.contains(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        Rules::parse(
            r#"
            [licenses]
            allow = ["MIT", "Apache-2.0", "Unicode-3.0", "Apache-2.0 WITH LLVM-exception"]
            [sources]
            allow-registry = ["https://example.org/index"]
            [bans]
            deny = [{ crate = "openssl" }]
            "#,
        )
        .unwrap()
    }

    #[test]
    fn expressions_follow_their_precedence() {
        let licences = rules().licences;
        for (expression, expected) in [
            ("MIT", Some(true)),
            ("GPL-3.0", Some(false)),
            ("GPL-3.0 OR MIT", Some(true)),
            ("MIT/GPL-3.0", Some(true)),
            ("MIT AND GPL-3.0", Some(false)),
            ("GPL-3.0 AND GPL-2.0 OR MIT", Some(true)),
            ("GPL-3.0 AND (GPL-2.0 OR MIT)", Some(false)),
            ("(MIT OR Apache-2.0) AND Unicode-3.0", Some(true)),
            ("Apache-2.0 WITH LLVM-exception", Some(true)),
            ("MIT WITH LLVM-exception", Some(false)),
            ("(MIT", None),
            ("MIT OR", None),
            ("MIT Apache-2.0", None),
        ] {
            assert_eq!(allowed(expression, &licences), expected, "{expression}");
        }
    }

    #[test]
    fn each_broken_rule_is_named() {
        let package = serde_json::json!({
            "name": "openssl", "version": "1.0.0", "license": "GPL-3.0", "source": "git+https://example.org/x"
        });
        assert_eq!(
            rules().faults(&package),
            [
                "openssl 1.0.0: licence `GPL-3.0` is not allowed",
                "openssl 1.0.0: comes from `git+https://example.org/x`",
                "openssl 1.0.0: is banned"
            ]
        );
        let own = serde_json::json!({ "name": "lora-core", "version": "0.1.0", "license": "MIT", "source": null });
        assert!(rules().faults(&own).is_empty());
    }
}
