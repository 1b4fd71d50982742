//! What is odd about the modules of an adapter, in a line for each reason.

use std::collections::BTreeMap;

use lora_core::adapter::Idle;

use crate::{failure::printable, text};

/// Modules of one reason that are named.
const NAMED: usize = 2;

/// Warnings about modules that change nothing, of `total`; none if there are none.
pub(crate) fn idle_warnings<'a>(idle: impl Iterator<Item = (&'a str, Idle)>, total: usize) -> Vec<String> {
    let mut reasons: BTreeMap<Idle, Vec<&str>> = BTreeMap::new();
    for (module, idle) in idle {
        reasons.entry(idle).or_default().push(module);
    }
    let count: usize = reasons.values().map(Vec::len).sum();
    let mut lines: Vec<String> = reasons
        .into_iter()
        .map(|(idle, modules)| {
            let (of, verb) =
                (text::plural(total as u64, "module"), if modules.len() == 1 { "changes" } else { "change" });
            format!("{} of {of} {verb} nothing: {idle} ({})", text::thousands(modules.len() as u64), first_of(&modules))
        })
        .collect();
    if count == total && count > 0 {
        lines.insert(0, "this adapter changes nothing".to_owned());
    }
    lines
}

/// Warnings about modules whose tensors have another rank than the configuration says, by the two of them.
pub(crate) fn rank_warnings<'a>(ranks: impl Iterator<Item = (&'a str, [usize; 2])>) -> Vec<String> {
    let mut pairs: BTreeMap<[usize; 2], Vec<&str>> = BTreeMap::new();
    for (module, pair) in ranks {
        pairs.entry(pair).or_default().push(module);
    }
    let line = |([configured, rank], modules): ([usize; 2], Vec<&str>)| {
        format!(
            "the configuration says rank {configured} where the tensors of {} have rank {rank} ({}): they decide here, and \
             peft refuses them",
            text::plural(modules.len() as u64, "module"),
            first_of(&modules)
        )
    };
    pairs.into_iter().map(line).collect()
}

/// `a`, `a, b`, `a, b and 26 more`.
fn first_of(names: &[&str]) -> String {
    let shown: Vec<String> = names.iter().take(NAMED).map(|name| printable(name)).collect();
    match names.len().saturating_sub(NAMED) {
        0 => shown.join(", "),
        more => format!("{} and {} more", shown.join(", "), text::thousands(more as u64)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_tells_of_all_modules_of_a_reason() {
        let idle = |list: &[(&'static str, Idle)], total| idle_warnings(list.iter().copied(), total);
        assert_eq!(idle(&[], 3), [""; 0]);
        assert_eq!(idle(&[("a", Idle::Up)], 3), ["1 of 3 modules changes nothing: up is all zeros (a)"]);
        assert_eq!(
            idle(&[("a", Idle::Up), ("b", Idle::Up), ("c", Idle::Up), ("d", Idle::Scale)], 4),
            [
                "this adapter changes nothing",
                "1 of 4 modules changes nothing: alpha is 0 (d)",
                "3 of 4 modules change nothing: up is all zeros (a, b and 1 more)"
            ]
        );
    }
}
