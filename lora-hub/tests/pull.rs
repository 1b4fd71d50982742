//! Models out of a hub that listens on this machine, and everything that can go wrong on the way.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Barrier,
    thread,
    time::Duration,
};

use lora_core::hub::ModelName;
use lora_hub::{Error, Event, Fetched, Hub, Plan, Result, Settings, Token, TokenSource, Wanted};
use support::{COMMIT, FakeHub, NAME, STRANGER, TOKEN};
use tempfile::TempDir;

/// A cache of its own for a hub.
struct Place {
    hub: FakeHub,
    cache: TempDir,
    settings: Settings,
}

impl Place {
    fn new() -> Self {
        let (hub, cache) = (FakeHub::language_model(), tempfile::tempdir().unwrap());
        let mut settings = Settings::new(cache.path().to_owned(), &hub.endpoint);
        settings.first_wait = Duration::from_millis(1);
        Self { hub, cache, settings }
    }

    fn with_token(mut self, token: &str) -> Self {
        self.settings.token = Some(Token::new(token, TokenSource::Variable("HF_TOKEN")).unwrap());
        self
    }

    fn plan(&self, name: &str) -> Result<Plan> {
        let name = ModelName::parse(name).unwrap();
        Hub::new(self.settings.clone())?.plan(&name, &Wanted::default(), &mut |_| {})
    }

    fn pull(&self, name: &str) -> Result<Fetched> {
        let plan = self.plan(name)?;
        Hub::new(self.settings.clone())?.fetch(&plan, &mut |_| {})
    }

    fn root(&self) -> PathBuf {
        self.cache.path().join("models--org--name")
    }

    fn blobs(&self) -> Vec<String> {
        let entries = fs::read_dir(self.root().join("blobs")).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The half of the weights.
    fn half(&self) -> PathBuf {
        self.root().join("blobs").join(format!("{}.incomplete", self.weights().digits()))
    }

    fn weights(&self) -> &support::File {
        self.hub.file("model.safetensors")
    }

    fn assert_whole(&self, path: &Path) {
        for name in ["config.json", "tokenizer.json", "model.safetensors", "additional_chat_templates/a b.jinja"] {
            assert!(fs::read(path.join(name)).unwrap() == self.hub.file(name).content, "{name}");
        }
        assert!(self.blobs().iter().all(|name| !name.ends_with(".incomplete")), "{:?}", self.blobs());
    }
}

#[test]
fn a_model_lies_in_the_cache_as_the_hubs_own_tools_lay_it() {
    let place = Place::new();
    let fetched = place.pull(NAME).unwrap();
    place.assert_whole(&fetched.path);
    assert_eq!(fetched.path, place.root().join("snapshots").join(COMMIT));
    assert_eq!(fs::read_to_string(place.root().join("refs/main")).unwrap(), COMMIT);
    #[cfg(unix)]
    {
        let link = |name: &str| fs::read_link(fetched.path.join(name)).unwrap();
        let digits = place.weights().digits();
        assert_eq!(link("model.safetensors"), PathBuf::from(format!("../../blobs/{digits}")));
        let template = "additional_chat_templates/a b.jinja";
        assert_eq!(link(template), PathBuf::from(format!("../../../blobs/{}", place.hub.file(template).digits())));
    }
    assert_eq!(ModelName::parse(NAME).unwrap().find(place.cache.path()).unwrap(), fetched.path);
}

#[test]
fn nothing_is_fetched_that_is_not_needed_and_nothing_twice() {
    let place = Place::new();
    assert_eq!(place.plan(NAME).unwrap().missing(), place.plan(NAME).unwrap().size());
    let fetched = place.pull(NAME).unwrap();
    assert_eq!(fetched.bytes, place.plan(NAME).unwrap().size());
    let unneeded = ["README.md", "pytorch_model.bin", "model-q4.gguf"];
    let asked = |seen: &support::Seen| unneeded.iter().any(|name| seen.path.ends_with(name));
    assert!(!place.hub.seen().iter().any(asked));
    assert_eq!(place.hub.contents().len(), 1);

    assert_eq!(place.plan(NAME).unwrap().missing(), 0);
    assert_eq!(place.pull(NAME).unwrap().bytes, 0);
    assert_eq!(place.hub.contents().len(), 1);
}

#[test]
fn revisions_are_kept_under_their_names_and_a_commit_needs_none() {
    let place = Place::new();
    place.pull("org/name@v1.0").unwrap();
    place.pull("org/name@refs/pr/1").unwrap();
    place.pull(&format!("org/name@{COMMIT}")).unwrap();
    let named = |name: &str| fs::read_to_string(place.root().join("refs").join(name)).ok();
    assert_eq!((named("v1.0"), named("refs/pr/1")), (Some(COMMIT.to_owned()), Some(COMMIT.to_owned())));
    assert_eq!((named("main"), named(COMMIT)), (None, None));
    assert_eq!(place.hub.contents().len(), 1, "one commit, fetched once");
}

#[test]
fn the_token_goes_to_the_hub_and_not_where_it_redirects_to() {
    let place = Place::new().with_token(TOKEN);
    place.hub.rules().private = true;
    place.pull(NAME).unwrap();
    let (elsewhere, here): (Vec<_>, Vec<_>) = place.hub.seen().into_iter().partition(|seen| seen.elsewhere);
    assert!(here.iter().any(|seen| seen.path.starts_with("/api/resolve-cache/")), "a redirect within the hub");
    let header = format!("Bearer {TOKEN}");
    assert!(here.iter().all(|seen| seen.authorization.as_deref() == Some(&header)), "{here:?}");
    assert!(!elsewhere.is_empty() && elsewhere.iter().all(|seen| seen.authorization.is_none()), "{elsewhere:?}");
}

#[test]
fn a_connection_that_breaks_is_taken_up_where_it_broke() {
    let place = Place::new();
    place.hub.rules().cuts = vec![100_000, 50_000];
    let fetched = place.pull(NAME).unwrap();
    place.assert_whole(&fetched.path);
    assert_eq!(fetched.bytes, place.plan(NAME).unwrap().size(), "nothing came twice");
    let ranges: Vec<_> = place.hub.contents().into_iter().map(|seen| seen.range).collect();
    assert_eq!(ranges, [None, Some("bytes=100000-".to_owned()), Some("bytes=150000-".to_owned())]);
}

#[test]
fn a_half_is_kept_for_the_next_call() {
    let mut place = Place::new();
    place.settings.retries = 0;
    place.hub.rules().cuts = vec![100_000];
    match place.pull(NAME) {
        Err(Error::Lost { file, kept: 100_000, size: 300_000, .. }) => assert_eq!(file, "model.safetensors"),
        other => panic!("{other:?}"),
    }
    assert_eq!(fs::read(place.half()).unwrap(), place.weights().content[..100_000]);
    assert!(ModelName::parse(NAME).unwrap().find(place.cache.path()).is_err(), "half a model is not found");
    let plan = place.plan(NAME).unwrap();
    assert_eq!(
        plan.size() - plan.missing(),
        100_000 + plan.files.iter().filter(|file| file.is_there).map(|file| file.size).sum::<u64>()
    );
    place.assert_whole(&place.pull(NAME).unwrap().path);
    assert_eq!(place.hub.contents().last().unwrap().range.as_deref(), Some("bytes=100000-"));
}

#[test]
fn a_server_without_ranges_starts_over() {
    let place = Place::new();
    {
        let mut rules = place.hub.rules();
        (rules.no_ranges, rules.cuts) = (true, vec![100_000]);
    }
    let fetched = place.pull(NAME).unwrap();
    place.assert_whole(&fetched.path);
    assert_eq!(fetched.bytes, place.plan(NAME).unwrap().size() + 100_000);
}

#[test]
fn wrong_bytes_never_become_a_blob() {
    let place = Place::new();
    place.hub.rules().corrupt = true;
    match place.pull(NAME) {
        Err(Error::WrongHash { file, expected, actual }) => {
            assert_eq!((file.as_str(), expected.digits()), ("model.safetensors", place.weights().digits().as_str()));
            assert_ne!(actual, place.weights().digits());
        }
        other => panic!("{other:?}"),
    }
    assert!(!place.blobs().iter().any(|name| name.starts_with(&place.weights().digits())), "{:?}", place.blobs());
    place.hub.rules().corrupt = false;
    place.assert_whole(&place.pull(NAME).unwrap().path);
}

#[test]
fn a_broken_half_costs_one_more_download_and_no_error() {
    let place = Place::new();
    fs::create_dir_all(place.root().join("blobs")).unwrap();
    for half in [vec![7; 1000], vec![7; 300_000], vec![7; 400_000]] {
        let _ = fs::remove_dir_all(place.root().join("snapshots"));
        let _ = fs::remove_file(place.root().join("blobs").join(place.weights().digits()));
        fs::write(place.half(), half).unwrap();
        place.assert_whole(&place.pull(NAME).unwrap().path);
    }
}

#[test]
fn more_bytes_than_the_file_has_are_refused() {
    let place = Place::new();
    place.hub.rules().long = true;
    assert!(matches!(place.pull(NAME), Err(Error::TooLong { size: 300_000, .. })));
    assert!(!place.half().exists() && place.blobs().iter().all(|name| *name != place.weights().digits()));
}

#[test]
fn a_gated_model_names_the_page_of_its_licence() {
    let page = |place: &Place| format!("{}/{NAME}", place.hub.endpoint);
    for taciturn in [false, true] {
        for (place, login) in [(Place::new(), false), (Place::new().with_token(STRANGER), true)] {
            {
                let mut rules = place.hub.rules();
                (rules.gated, rules.taciturn) = (true, taciturn);
            }
            match place.pull(NAME) {
                Err(error @ Error::Gated { .. }) => {
                    assert!(error.is_authentication());
                    let Error::Gated { page: named, token, .. } = error else { unreachable!() };
                    assert_eq!((named, token.is_some()), (page(&place), login));
                }
                other => panic!("{other:?}"),
            }
        }
        let place = Place::new().with_token(TOKEN);
        place.hub.rules().gated = true;
        place.assert_whole(&place.pull(NAME).unwrap().path);
    }
}

#[test]
fn a_model_that_is_not_there_and_one_that_is_not_shown_are_told_apart_as_far_as_the_hub_does() {
    let stranger = Place::new();
    match stranger.pull("org/nmae") {
        Err(Error::Login { suggestion, .. }) => assert_eq!(suggestion.as_deref(), Some(NAME)),
        other => panic!("{other:?}"),
    }
    match stranger.pull("nobody/nothing") {
        Err(Error::Login { suggestion: None, .. }) => {}
        other => panic!("{other:?}"),
    }
    let known = Place::new().with_token(TOKEN);
    match known.pull("org/nmae") {
        Err(Error::NoModel { suggestion, .. }) => assert_eq!(suggestion.as_deref(), Some(NAME)),
        other => panic!("{other:?}"),
    }
    let wrong = Place::new().with_token("hf_expired");
    match wrong.pull(NAME) {
        Err(Error::TokenRefused { source_of_token, .. }) => {
            assert_eq!(source_of_token, TokenSource::Variable("HF_TOKEN"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_revision_that_is_not_there_is_no_missing_model() {
    for taciturn in [false, true] {
        let place = Place::new();
        place.hub.rules().taciturn = taciturn;
        match place.pull("org/name@v1.1") {
            Err(Error::NoRevision { revision, known, suggestion, .. }) => {
                assert_eq!(revision, "v1.1");
                assert_eq!(
                    (known, suggestion.as_deref()),
                    (vec!["main".into(), "v1.0".into(), "v2.0".into()], Some("v1.0"))
                );
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_busy_hub_is_asked_again() {
    let place = Place::new();
    place.hub.rules().busy = 2;
    let mut waits = Vec::new();
    let name = ModelName::parse(NAME).unwrap();
    let mut on = |event: Event<'_>| {
        if let Event::Retry { reason, wait, .. } = event {
            waits.push((reason.to_owned(), wait));
        }
    };
    Hub::new(place.settings.clone()).unwrap().plan(&name, &Wanted::default(), &mut on).unwrap();
    assert_eq!(waits.len(), 2);
    assert!(waits.iter().all(|(reason, wait)| reason.contains("503") && wait.is_zero()), "{waits:?}");

    place.hub.rules().busy = 100;
    match place.pull(NAME) {
        Err(error @ Error::Status { status: 503, .. }) => assert!(error.is_network()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_connection_that_falls_silent_counts_as_lost() {
    let mut place = Place::new();
    (place.settings.retries, place.settings.silence) = (0, Duration::from_millis(200));
    place.hub.rules().slow = Duration::from_secs(2);
    match place.pull(NAME) {
        Err(Error::Lost { kept, .. }) => assert!((1..300_000).contains(&kept), "{kept}"),
        // The first answer may be what is late.
        Err(Error::Unreachable { .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn nobody_there_is_said_after_some_tries() {
    let mut place = Place::new();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    place.settings.endpoint = format!("http://{free}");
    match place.pull(NAME) {
        Err(error @ Error::Unreachable { .. }) => assert!(error.is_network(), "{error}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn listings_without_sizes_are_completed_by_headers() {
    let place = Place::new();
    place.hub.rules().bare = true;
    place.assert_whole(&place.pull(NAME).unwrap().path);
}

#[test]
fn redirects_in_circles_end() {
    let place = Place::new();
    place.hub.rules().circles = true;
    match place.pull(NAME) {
        Err(Error::Unreachable { reason, .. }) => assert!(reason.contains("circles"), "{reason}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn two_at_once_fetch_each_file_once() {
    let place = Place::new();
    place.hub.rules().slow = Duration::from_micros(500);
    let (start, mut waited) = (Barrier::new(2), 0);
    let results: Vec<_> = thread::scope(|scope| {
        let both = [0, 1].map(|_| {
            scope.spawn(|| {
                let plan = place.plan(NAME).unwrap();
                start.wait();
                let mut waited = 0;
                let fetched = Hub::new(place.settings.clone()).unwrap().fetch(&plan, &mut |event| {
                    waited += usize::from(matches!(event, Event::Waiting { .. }));
                });
                (fetched, waited)
            })
        });
        both.map(|thread| thread.join().unwrap()).into_iter().collect()
    });
    for (fetched, others) in results {
        place.assert_whole(&fetched.unwrap().path);
        waited += others;
    }
    assert!(waited > 0, "one has waited for the other");
    assert_eq!(place.hub.contents().len(), 1);
}

#[test]
fn copies_stand_where_links_are_not_wanted() {
    let mut place = Place::new();
    place.settings.copies = true;
    let fetched = place.pull(NAME).unwrap();
    place.assert_whole(&fetched.path);
    assert!(!fs::symlink_metadata(fetched.path.join("config.json")).unwrap().is_symlink());
    assert_eq!(place.pull(NAME).unwrap().bytes, 0);
}

#[cfg(unix)]
#[test]
fn a_link_to_a_blob_that_is_gone_is_made_anew() {
    let place = Place::new();
    let fetched = place.pull(NAME).unwrap();
    fs::remove_dir_all(place.root().join("blobs")).unwrap();
    assert_eq!(place.pull(NAME).unwrap().bytes, fetched.bytes);
    place.assert_whole(&fetched.path);
}
