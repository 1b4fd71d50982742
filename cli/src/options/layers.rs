//! Putting the layers of options on top of each other, and remembering which one spoke.

use std::{
    collections::BTreeMap,
    env, fmt,
    path::{Path, PathBuf},
};

use clap::{ArgMatches, parser::ValueSource};
use serde_json::{Map, Value};

use super::{ConfigError, Options, Preset, TrainConfig, TrainOptions, file, keys, variable};

/// Where the value of a key comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The command line.
    Flag,
    /// An environment variable.
    Variable(String),
    /// A configuration file.
    File {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
    },
    /// The chosen preset.
    Preset(Preset),
    /// Nobody said anything.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag => f.write_str("flag"),
            Self::Variable(name) => write!(f, "variable {name}"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Preset(preset) => write!(f, "preset {}", super::values::word(preset)),
            Self::Default => f.write_str("default"),
        }
    }
}

/// What one layer says, with the origin of each key that speaks.
#[derive(Debug, Clone)]
pub struct Layer<O> {
    /// The options; silent ones are `None`.
    pub options: O,
    /// The origin of each key that speaks.
    pub origins: BTreeMap<String, Origin>,
}

/// The places outside the command line where configuration is found.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// `lora.toml` is searched from here upwards.
    pub folder: PathBuf,
    /// The user's own configuration, if there is a place for one.
    pub user: Option<PathBuf>,
}

impl Surroundings {
    /// This process' working folder and user.
    pub fn here() -> Self {
        let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = || set("HOME").or_else(|| set("USERPROFILE")).map(|home| home.join(".config"));
        Self {
            folder: env::current_dir().unwrap_or_else(|_| ".".into()),
            user: set("XDG_CONFIG_HOME").or_else(home).map(|folder| folder.join("lora").join("config.toml")),
        }
    }

    /// The nearest `lora.toml`, from the working folder upwards.
    pub fn project(&self) -> Option<PathBuf> {
        self.folder.ancestors().map(|folder| folder.join("lora.toml")).find(|path| path.is_file())
    }
}

/// All that was said, layer over layer.
#[derive(Debug, Clone)]
pub struct Layers<O> {
    /// The sum: the highest layer that speaks, key by key; presets included, defaults not.
    pub options: O,
    origins: BTreeMap<String, Origin>,
}

impl<O: Options + Clone> Layers<O> {
    /// Everything above the preset and the preset itself: `parsed` holds flags and variables, `matches` tells them apart.
    ///
    /// # Errors
    /// If a configuration file is wrong.
    pub fn gather(
        parsed: O,
        matches: &ArgMatches,
        config: Option<&Path>,
        surroundings: &Surroundings,
    ) -> Result<Self, ConfigError> {
        refuse_lost(&parsed, matches)?;
        let mut layers = Self { options: O::default(), origins: BTreeMap::new() };
        for layer in command_line(parsed, matches) {
            layers.under(layer);
        }
        if let Some(path) = config {
            layers.under(file::read(path)?);
        }
        if let Some(path) = surroundings.project() {
            layers.under(file::read(&path)?);
        }
        if let Some(path) = surroundings.user.as_deref().filter(|path| path.is_file()) {
            layers.under(file::read(path)?);
        }
        if let Some(preset) = layers.options.preset() {
            layers.under_preset(preset);
        }
        Ok(layers)
    }

    /// Where the value of `key` comes from.
    pub fn origin(&self, key: &str) -> Origin {
        self.origins.get(key).cloned().unwrap_or(Origin::Default)
    }

    /// Adds a layer below all others.
    fn under(&mut self, layer: Layer<O>) {
        let before = file::said(&self.options);
        self.options = self.options.clone().or(layer.options);
        // A key may have been silenced by another one (steps and epochs): only what now speaks has an origin.
        for key in file::said(&self.options).into_iter().map(|(key, _)| key).filter(|key| !before.contains_key(key)) {
            if let Some(origin) = layer.origins.get(&key) {
                self.origins.insert(key, origin.clone());
            }
        }
    }

    fn under_preset(&mut self, preset: Preset) {
        let mut values = file::said(&preset.options());
        let mine = keys::<O>();
        values.retain(|key, _| mine.contains(key));
        let origins = values.keys().map(|key| (key.clone(), Origin::Preset(preset))).collect();
        self.under(Layer { options: from_map(values), origins });
    }
}

/// Flags, and below them variables: clap reads both, and its matches tell which is which.
fn command_line<O: Options>(parsed: O, matches: &ArgMatches) -> [Layer<O>; 2] {
    let is_flag = |key: &str| matches.value_source(&key.replace('-', "_")) != Some(ValueSource::EnvVariable);
    let (flags, variables): (Map<_, _>, Map<_, _>) = file::said(&parsed).into_iter().partition(|(key, _)| is_flag(key));
    let layer = |values: Map<String, Value>, origin: fn(&str) -> Origin| Layer {
        origins: values.keys().map(|key| (key.clone(), origin(key))).collect(),
        options: from_map(values),
    };
    [layer(flags, |_| Origin::Flag), layer(variables, |key| Origin::Variable(variable(O::TABLE, key)))]
}

/// Refuses `nan` and `inf`, which are numbers to the parser and nothing to JSON: they would count as not said.
fn refuse_lost<O: Options>(parsed: &O, matches: &ArgMatches) -> Result<(), ConfigError> {
    let kept = file::said(parsed);
    for key in keys::<O>().into_iter().filter(|key| !kept.contains_key(key)) {
        let Ok(Some(mut raw)) = matches.try_get_raw(&key.replace('-', "_")) else { continue };
        if let Some(raw) = raw.next() {
            let raw = raw.to_string_lossy();
            return Err(ConfigError::invalid(&format!("--{key}"), raw, "it must be a finite number"));
        }
    }
    Ok(())
}

/// Options that say what `map` holds.
fn from_map<O: Options>(map: Map<String, Value>) -> O {
    serde_json::from_value(Value::Object(map)).expect("the values were made from the same options")
}

/// Keys that may change when a run goes on: they leave what is learnt in a given step as it was.
pub const CHANGEABLE: [&str; 12] = [
    "steps",
    "epochs",
    "sample",
    "sample-every",
    "sample-steps",
    "sample-guidance",
    "sample-negative",
    "sampler",
    "validate-every",
    "save-every",
    "keep",
    "log-every",
];

/// What the run in `run` goes on with: its own `config.toml`, and of the flags those that do not make it another run.
///
/// Variables and other files play no part: the run is to be the same wherever it is resumed. A run moved to another
/// machine may change `--device`, and `--data` or `--base` where these moved; whether their content is the same is
/// checked by what the checkpoint records.
///
/// # Errors
/// If `config.toml` cannot be read, or a flag asks for another run.
pub fn resume(run: &Path, parsed: TrainOptions, matches: &ArgMatches) -> Result<TrainConfig, ConfigError> {
    let stored = file::read::<TrainOptions>(&run.join("config.toml"))?.options;
    refuse_lost(&parsed, matches)?;
    let [flags, _] = command_line(parsed, matches);
    let asked = file::said(&flags.options);
    let before = file::said(&stored);
    let moved = ["device", "data", "base", "out"];
    let changes: Vec<_> = asked
        .iter()
        .filter(|(key, value)| {
            let free = CHANGEABLE.contains(&key.as_str()) || moved.contains(&key.as_str());
            !free && before.get(*key) != Some(value)
        })
        .map(|(key, value)| (key.clone(), shown(before.get(key)), shown(Some(value))))
        .collect();
    if !changes.is_empty() {
        return Err(ConfigError::ResumeDiffers { run: run.to_owned(), changes });
    }
    let mut config = from_map::<TrainOptions>(asked).or(stored).resolve()?;
    config.out = Some(run.to_owned());
    Ok(config)
}

fn shown(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => "not set".into(),
        Some(Value::String(word)) => word.clone(),
        Some(other) => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, Command, FromArgMatches as _};

    use super::*;

    fn parse(flags: &[&str]) -> (TrainOptions, ArgMatches) {
        let command = TrainOptions::augment_args(Command::new("lora"));
        let matches = command.try_get_matches_from([&["lora"], flags].concat()).unwrap();
        (TrainOptions::from_arg_matches(&matches).unwrap(), matches)
    }

    /// A folder with a user configuration, a project file two levels above the working folder, and a `--config` file.
    fn folders() -> (tempfile::TempDir, Surroundings, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        std::fs::create_dir_all(at("project/a/b")).unwrap();
        std::fs::write(at("user.toml"), "rank = 1\nlr = 0.1\nclip = 0.5\nkeep = 9\n").unwrap();
        std::fs::write(at("project/lora.toml"), "rank = 2\nlr = 0.2\nbatch = 22\n").unwrap();
        std::fs::write(at("given.toml"), "# comment\nrank = 3\npreset = \"demo-style\"\n").unwrap();
        let surroundings = Surroundings { folder: at("project/a/b"), user: Some(at("user.toml")) };
        let given = at("given.toml");
        (root, surroundings, given)
    }

    #[test]
    fn the_highest_layer_that_speaks_wins() {
        let (root, surroundings, given) = folders();
        let (parsed, matches) = parse(&["--seed", "5"]);
        let layers = Layers::gather(parsed, &matches, Some(&given), &surroundings).unwrap();
        let options = &layers.options;
        assert_eq!(options.seed, Some(5)); // flag
        assert_eq!(options.rank.unwrap().get(), 3); // --config over project over user
        assert_eq!(options.lr, Some(0.2)); // project over user and preset
        assert_eq!(options.clip, Some(0.5)); // user over preset
        assert_eq!(options.steps, Some(800)); // preset of the --config file
        assert_eq!(options.ema, None); // default
        let file = |name: &str, line| Origin::File { path: root.path().join(name), line };
        assert_eq!(layers.origin("seed"), Origin::Flag);
        assert_eq!(layers.origin("rank"), file("given.toml", 2));
        assert_eq!(layers.origin("batch"), file("project/lora.toml", 3));
        assert_eq!(layers.origin("keep"), file("user.toml", 4));
        assert_eq!(layers.origin("steps"), Origin::Preset(Preset::DemoStyle));
        assert_eq!(layers.origin("ema"), Origin::Default);
    }

    #[test]
    fn a_number_that_is_none_is_refused_and_not_passed_over() {
        let (_root, surroundings, _) = folders();
        for flags in [["--lr", "nan"], ["--lora-plus", "inf"]] {
            let (parsed, matches) = parse(&flags);
            let error = Layers::gather(parsed, &matches, None, &surroundings).unwrap_err();
            assert_eq!(error.to_string(), format!("`{}` is {}", flags[0], flags[1]));
        }
        let (parsed, matches) = parse(&["--name", "nan"]);
        assert_eq!(Layers::gather(parsed, &matches, None, &surroundings).unwrap().options.name.as_deref(), Some("nan"));
    }

    #[test]
    fn a_silenced_key_has_no_origin() {
        let (_root, surroundings, given) = folders();
        let (parsed, matches) = parse(&["--epochs", "3"]);
        let layers = Layers::gather(parsed, &matches, Some(&given), &surroundings).unwrap();
        assert_eq!(layers.options.steps, None);
        assert_eq!(layers.origin("steps"), Origin::Default);
    }

    #[test]
    fn a_run_goes_on_only_as_itself() {
        let run = tempfile::tempdir().unwrap();
        let (options, _) = parse(&["pictures", "--base", "b", "--rank", "4", "--steps", "100"]);
        let config = options.resolve().unwrap();
        std::fs::write(run.path().join("config.toml"), config.to_toml()).unwrap();

        let resumed = |flags: &[&str]| {
            let (parsed, matches) = parse(flags);
            resume(run.path(), parsed, &matches)
        };
        let same = TrainConfig { out: Some(run.path().into()), ..config };
        assert_eq!(resumed(&[]).unwrap(), same);
        assert_eq!(resumed(&["--rank", "4"]).unwrap(), same);
        assert_eq!(resumed(&["--steps", "200"]).unwrap().length, super::super::Length::Steps(200));
        match resumed(&["--rank", "8", "--lr", "1e-4"]) {
            Err(ConfigError::ResumeDiffers { changes, .. }) => {
                assert_eq!(changes, [("rank".to_owned(), "4".to_owned(), "8".to_owned())]);
            }
            other => panic!("{other:?}"),
        }
    }
}
