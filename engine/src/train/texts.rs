//! What is a run's own when it learns from texts: language models.

mod outline;

use std::collections::BTreeMap;

use lora_cli::{
    Failure,
    options::{TextConfig, TrainConfig},
    plan::Plan,
    run::{RunError, Sample},
    ui::Ui,
};
use lora_core::format::{self, BaseModel, Dtype, write_atomically};
use lora_llm::{
    Example,
    chat::message,
    data::Dataset,
    example::Padding,
    generate::{GenerateOptions, Sampling, generate},
    objective::{EmbeddingNoise, LanguageObjective, LanguageOptions, TrainingSet, evaluate},
    question::Question,
};
use tch::Device;

use super::{Facts, Family, Found, Known, Prepared, SamplePlace, hex, plan::Outline};
use crate::{base, failures::Explain as _, texts::TextBase};

/// Questions that are asked while training if nobody says which.
const QUESTIONS: usize = 4;

/// The most tokens of an answer while training.
const ANSWER: usize = 128;

/// Lengths are rounded up to these on a GPU, where every length is captured as a graph of its own.
const GPU_PADDING: usize = 64;

/// A base and texts that were found; the weights are not loaded yet.
pub(super) struct FoundTexts {
    base: TextBase,
    dataset: Dataset,
    names: BaseModel,
}

/// What answers beside a training.
pub(super) struct Texts {
    base: TextBase,
    family: format::Family,
    /// Questions out of the data, with their ids as the model was taught them.
    questions: Vec<(String, Vec<u32>)>,
    /// Examples that are not trained on.
    validation: Vec<Example>,
}

/// Looks at base and texts.
///
/// # Errors
/// If the base is none, or there is nothing to train on.
pub(super) fn find(config: &TrainConfig, resume: bool) -> Result<FoundTexts, Failure> {
    // Some templates write the date into every conversation: a run that goes on keeps that of its beginning.
    let began =
        config.out.as_ref().filter(|_| resume).and_then(|out| out.join("config.toml").metadata().ok()?.modified().ok());
    let base = TextBase::find(&config.base, config.chat_template.as_deref(), config.quantize)?;
    let TrainConfig { max_len, train_on, on_long, on_bad, .. } = *config;
    let text = TextConfig { max_len, train_on, on_long, on_bad };
    let dataset = base.read(&config.data, text, config.validation, config.seed, began)?;
    let names = base.files.model().explain()?;
    Ok(FoundTexts { base, dataset, names })
}

impl Found for FoundTexts {
    type Family = Texts;

    fn names(&self) -> Result<BaseModel, Failure> {
        self.base.files.model().explain()
    }

    fn outline(&self, known: &Known) -> Outline<'_> {
        self.in_plan(known)
    }

    fn prepare(self, known: &Known, _: &Ui) -> Result<Prepared<Texts>, Failure> {
        let Self { base, dataset, names } = self;
        let Known { config, machine, .. } = known;
        let batch = config.batch.get();
        let lanes = machine.lanes(batch);
        let mut decoders = base.files.load_decoders(&machine.on, 1 + lanes).explain()?.into_iter();
        let Some(decoder) = decoders.next() else {
            return Err(Failure::new("base", format!("nothing was built from {}", base.files.path.display())));
        };
        let facts = Facts {
            data_hash: hex(&dataset.hash()),
            base_hash: hex(&base::hash_files(&base.files.weight_files().explain()?, &base::cache())?),
            examples: dataset.train.len(),
        };
        let asked = if dataset.validation.is_empty() { &dataset.train } else { &dataset.validation };
        let mut questions = Vec::new();
        for example in asked {
            if questions.len() == QUESTIONS {
                break;
            }
            if let Some(question) = Question::of(example, &base.tokenizer).explain()? {
                questions.push((base.tokenizer.decode(&question.prompt, false).explain()?, question.prompt));
            }
        }
        let accumulation = config.accum.get() as u64;
        let packed = config.packing.then_some(config.max_len.get().min(base.files.config.max_positions));
        let set = TrainingSet::new(dataset.train, &decoder, config.seed, batch, accumulation, packed).explain()?;
        let options = LanguageOptions {
            accumulation,
            recompute: config.checkpointing,
            padding: Padding {
                multiple: if machine.on.device == Device::Cpu { 1 } else { GPU_PADDING },
                packed: config.packing,
            },
        };
        let mut objective = LanguageObjective::new(decoder, set, options).with_replicas(decoders);
        if config.neftune > 0.0 {
            objective = objective.with_noise(EmbeddingNoise { amount: config.neftune, seed: config.seed });
        }
        let prompts = questions.iter().map(|(shown, _)| shown.clone()).collect();
        let (family, validation) = (names.family().clone(), dataset.validation);
        Ok(Prepared { family: Texts { base, family, questions, validation }, objective, prompts, facts })
    }
}

impl Family for Texts {
    type Objective = LanguageObjective<TrainingSet>;

    const DTYPE: Dtype = Dtype::F32;

    fn sample(
        &self,
        objective: &mut Self::Objective,
        Known { config, .. }: &Known,
        prompts: &[String],
        SamplePlace { step, folder, events }: SamplePlace<'_>,
    ) -> Result<Vec<Sample>, Failure> {
        let options = GenerateOptions { sampling: Sampling::GREEDY, max_tokens: ANSWER, stop: self.base.ends() };
        let mut samples = Vec::new();
        for (at, prompt) in prompts.iter().enumerate() {
            let ids = match self.questions.iter().find(|(shown, _)| shown == prompt) {
                Some((_, ids)) => ids.clone(),
                None => self.base.ids(&[message("user", prompt)])?,
            };
            let answer = generate(objective.decoder(), &ids, &options).explain()?;
            let answer = self.base.tokenizer.decode(&answer, false).explain()?;
            let file = format!("{at:02}.txt");
            let path = folder.join(&file);
            std::fs::write(&path, answer.trim()).map_err(|source| RunError::Write { path, source })?;
            events.text(step, &format!("samples/{at:02} {prompt}"), answer.trim())?;
            samples.push(Sample { file, prompt: prompt.clone(), seed: config.seed });
        }
        Ok(samples)
    }

    fn validate(&self, objective: &Self::Objective, Known { config, .. }: &Known) -> Result<Option<f64>, Failure> {
        if self.validation.is_empty() {
            return Ok(None);
        }
        Ok(Some(evaluate(objective.decoder(), &self.validation, config.batch.get()).explain()?.loss))
    }

    fn metadata(&self, known: &Known, facts: &Facts, plan: &Plan, step: u64) -> BTreeMap<String, String> {
        let Known { config, .. } = known;
        let mut said: Vec<(&str, String)> = vec![
            ("lora.version", env!("CARGO_PKG_VERSION").to_owned()),
            ("lora.base_hash", facts.base_hash.clone()),
            ("lora.data_hash", facts.data_hash.clone()),
            ("lora.steps", format!("{step} of {}", plan.steps)),
            ("lora.recipe", plan.recipe.clone()),
            ("lora.seed", config.seed.to_string()),
            ("modelspec.title", config.name.clone()),
        ];
        if !config.private {
            said.push(("base_model_name_or_path", config.base.clone()));
        }
        said.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }

    fn base(&self) -> &format::Family {
        &self.family
    }

    /// The model card that peft's folders have.
    fn finish(&self, folder: &std::path::Path, known: &Known, plan: &Plan) -> Result<(), Failure> {
        let Known { config, .. } = known;
        if config.no_metadata {
            return Ok(());
        }
        let base = if config.private { String::new() } else { format!("base_model: {}\n", config.base) };
        let card = format!(
            "---\n{base}library_name: peft\npipeline_tag: text-generation\ntags:\n- lora\n---\n\n# {}\n\n\
             {} on {} modules, {} steps of {}.\n",
            config.name, plan.adapter, plan.modules, plan.steps, plan.recipe,
        );
        write_atomically(&folder.join("README.md"), |file| file.write_all(card.as_bytes())).explain()
    }
}
