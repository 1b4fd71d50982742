//! Every adapter that a peer wrote, merged as the peer merges it; every hostile file refused by name.

mod parity;

use std::path::Path;

#[test]
fn every_case_gives_the_peers_weights() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats");
    let outcomes = parity::run(&root, &[]);
    let failures: Vec<String> =
        outcomes.iter().filter(|outcome| !outcome.problems.is_empty()).map(ToString::to_string).collect();
    assert!(failures.is_empty(), "{} of {} cases:\n{}", failures.len(), outcomes.len(), failures.join("\n"));
    assert_eq!(outcomes.len(), 94 + 43, "cases of adapters and hostile files");
}
