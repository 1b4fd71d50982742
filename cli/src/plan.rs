//! What a run says before its first step: what was found, what is trained, what it costs.
//!
//! The engine fills a [`Plan`] in; its JSON form is the contract of `train --dry-run --json` and `plan.json` of the run.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{failure::printable, text, ui::Paint};

/// Everything that is known before the first step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The base as it was named.
    pub base: String,
    /// What the base turned out to be: `Stable Diffusion 1.x, 4.6 M parameters, fp16 files`.
    pub base_kind: String,
    /// What will be trained on.
    pub data: DataPlan,
    /// The adapter in words: `LoRA rank 16, alpha 16`.
    pub adapter: String,
    /// What carries it: `attention of the UNet`.
    pub targets: String,
    /// Modules that get an adapter.
    pub modules: u64,
    /// Numbers that are learnt.
    pub trainable_parameters: u64,
    /// Size of the adapter file.
    pub file_bytes: u64,
    /// Updates.
    pub steps: u64,
    /// Passes over the data.
    pub epochs: f64,
    /// Examples per batch.
    pub batch: u64,
    /// Batches per update.
    pub accum: u64,
    /// Optimizer, rate and schedule in words: `AdamW lr 1e-4, cosine after 50 steps of warm-up`.
    pub recipe: String,
    /// Where and in which precision: `cpu, fp32`.
    pub machine: String,
    /// Seed of all randomness.
    pub seed: u64,
    /// Estimated memory.
    pub memory_bytes: Memory,
    /// Estimated time.
    pub seconds: Seconds,
    /// The run's folder.
    pub out: PathBuf,
    /// Steps between checkpoints; `None` saves at the end only.
    pub save_every: Option<u64>,
    /// Checkpoints that are kept; 0 keeps all.
    pub keep: u64,
    /// Steps between samples; `None` draws none.
    pub sample_every: Option<u64>,
    /// Steps between measurements of the validation loss; `None` measures none.
    pub validate_every: Option<u64>,
}

/// What was found in the data.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DataPlan {
    /// The folder or file.
    pub source: PathBuf,
    /// How it was read: `flat folder, .txt captions`.
    pub layout: String,
    /// What one example is called: `picture`.
    pub unit: String,
    /// Examples that are trained on.
    pub used: u64,
    /// What is not, and why.
    pub skipped: Vec<Skipped>,
    /// What else a person should know: `3 without caption`.
    pub notes: Vec<String>,
    /// Sizes that the examples are brought to.
    pub buckets: Vec<Bucket>,
}

/// A file that is not trained on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// The file.
    pub path: PathBuf,
    /// Why, in a few words.
    pub reason: String,
}

/// Pictures of one size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bucket {
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Pictures.
    pub count: u64,
}

/// Estimated memory in bytes, on the device that trains.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Frozen weights and the adapter.
    pub weights: u64,
    /// What the backward pass needs of the forward pass, at its peak.
    pub activations: u64,
    /// Gradients and the optimizer's state.
    pub optimizer: u64,
    /// Latents and text embeddings that are kept.
    pub cache: u64,
    /// All of it.
    pub total: u64,
    /// What the device has free, if it says so.
    pub free: Option<u64>,
}

/// Estimated time in seconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Seconds {
    /// Reading and encoding the data.
    pub prepare: f64,
    /// All updates; `None` until a step was timed.
    pub train: Option<f64>,
    /// All samples; `None` until one was timed.
    pub samples: Option<f64>,
}

/// Skipped files that are named on the screen; the rest is counted.
const NAMED: usize = 5;

impl Plan {
    /// The plan for a terminal of 80 columns, as in
    ///
    /// ```text
    /// Found   24 pictures in styles/neon (flat folder, .txt captions)
    /// Base    Stable Diffusion 1.x, 4.6 M parameters, fp16 files
    /// ```
    pub fn render(&self, paint: Paint) -> String {
        let mut rows: Vec<(&str, String)> = Vec::new();
        let data = &self.data;
        let found = text::plural(data.used + data.skipped.len() as u64, &data.unit);
        rows.push(("Found", format!("{found} in {} ({})", printable(&text::path(&data.source)), data.layout)));
        rows.extend(data.lines().into_iter().map(|line| ("", line)));
        rows.push(("Base", printable(&self.base_kind)));
        rows.push((
            "Adapter",
            format!(
                "{} on {}: {}, {} parameters, file ≈ {}",
                self.adapter,
                self.targets,
                text::plural(self.modules, "module"),
                text::count(self.trainable_parameters),
                text::bytes(self.file_bytes)
            ),
        ));
        let batch =
            if self.accum > 1 { format!("{} × accum {}", self.batch, self.accum) } else { self.batch.to_string() };
        rows.push((
            "Plan",
            format!(
                "{} ({} epochs), batch {batch}, {}, {}, seed {}",
                text::plural(self.steps, "step"),
                text::real((self.epochs * 10.0).round() / 10.0),
                self.recipe,
                self.machine,
                self.seed
            ),
        ));
        rows.push(("Memory", self.memory_bytes.line()));
        rows.push(("Time", self.seconds.line()));
        rows.push(("Output", self.output()));
        let mut lines = Vec::new();
        for (label, row) in rows {
            for (index, line) in text::wrap(&row, 71).into_iter().enumerate() {
                let label = if index == 0 { label } else { "" };
                lines.push(format!("{} {line}", paint.bold(&format!("{label:<8}"))));
            }
        }
        lines.join("\n")
    }

    fn output(&self) -> String {
        let mut parts = vec![printable(&text::path(&self.out))];
        parts.push(match (self.save_every, self.keep) {
            (None, _) => "saved at the end".into(),
            (Some(every), 0) => format!("save every {every}"),
            (Some(every), keep) => format!("save every {every} (keep {keep})"),
        });
        if let Some(every) = self.sample_every {
            parts.push(format!("sample every {every}"));
        }
        if let Some(every) = self.validate_every {
            parts.push(format!("validate every {every}"));
        }
        parts.push("stop with Ctrl-C, resume any time".into());
        parts.join(" · ")
    }
}

impl DataPlan {
    fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if !self.skipped.is_empty() {
            let named = self.skipped.iter().take(NAMED).map(|skipped| {
                let name = skipped.path.file_name().unwrap_or(skipped.path.as_os_str());
                format!("{} ({})", printable(&name.to_string_lossy()), printable(&skipped.reason))
            });
            let mut list: Vec<_> = named.collect();
            if self.skipped.len() > NAMED {
                list.push(format!("and {} more: `lora data check`", self.skipped.len() - NAMED));
            }
            lines.push(format!("{} used · {} skipped: {}", self.used, self.skipped.len(), list.join(", ")));
        }
        let mut facts: Vec<_> = self.notes.iter().map(|note| printable(note)).collect();
        if !self.buckets.is_empty() {
            let buckets =
                self.buckets.iter().map(|bucket| format!("{}×{} ×{}", bucket.width, bucket.height, bucket.count));
            facts.push(format!("buckets {}", buckets.collect::<Vec<_>>().join(", ")));
        }
        if !facts.is_empty() {
            lines.push(facts.join(" · "));
        }
        lines
    }
}

impl Memory {
    fn line(&self) -> String {
        let parts = [
            ("weights", self.weights),
            ("activations", self.activations),
            ("optimizer", self.optimizer),
            ("cache", self.cache),
        ];
        let parts: Vec<_> = parts
            .iter()
            .filter(|(_, size)| *size > 0)
            .map(|(name, size)| format!("{name} {}", text::bytes(*size)))
            .collect();
        let free = self.free.map_or_else(String::new, |free| format!(" of {} free", text::bytes(free)));
        format!("≈ {}{free} ({})", text::bytes(self.total), parts.join(", "))
    }
}

impl Seconds {
    /// The sum of what is known.
    pub fn total(&self) -> f64 {
        self.prepare + self.train.unwrap_or(0.0) + self.samples.unwrap_or(0.0)
    }

    fn line(&self) -> String {
        let mut parts = vec![format!("preparing ≈ {}", text::estimate(self.prepare))];
        match self.train {
            Some(train) => parts.push(format!("training ≈ {}", text::estimate(train))),
            None => parts.push("training is timed after step 5".into()),
        }
        parts.extend(self.samples.map(|samples| format!("samples ≈ {}", text::estimate(samples))));
        parts.join(" · ")
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A plan as the engine might fill it in.
    pub(crate) fn example() -> Plan {
        let skipped = |path: &str, reason: &str| Skipped { path: path.into(), reason: reason.into() };
        Plan {
            base: "sd15".into(),
            base_kind: "Stable Diffusion 1.x, 860 M parameters, fp16 files".into(),
            data: DataPlan {
                source: "photos".into(),
                layout: "flat folder, .txt captions".into(),
                unit: "picture".into(),
                used: 38,
                skipped: vec![
                    skipped("photos/IMG_2210.jpg", "truncated JPEG"),
                    skipped("photos/ban\u{1b}ner.psd", "not a picture"),
                ],
                notes: vec!["3 without caption".into(), "5 turned by EXIF".into()],
                buckets: vec![
                    Bucket { width: 512, height: 512, count: 22 },
                    Bucket { width: 448, height: 576, count: 16 },
                ],
            },
            adapter: "LoRA rank 16, alpha 16".into(),
            targets: "attention+ff of the UNet".into(),
            modules: 192,
            trainable_parameters: 6_380_000,
            file_bytes: 12_800_000,
            steps: 1500,
            epochs: 157.89,
            batch: 1,
            accum: 4,
            recipe: "AdamW lr 1e-4, cosine after 75 steps of warm-up".into(),
            machine: "cuda:0, bf16".into(),
            seed: 42,
            validate_every: None,
            memory_bytes: Memory {
                weights: 1 << 31,
                activations: 1 << 30,
                optimizer: 77_000_000,
                cache: 900_000,
                total: (3 << 30) + 77_900_000,
                free: Some(11 << 30),
            },
            seconds: Seconds { prepare: 61.0, train: None, samples: None },
            out: "runs/photos-1".into(),
            save_every: Some(150),
            keep: 2,
            sample_every: Some(150),
        }
    }

    #[test]
    fn the_plan_fits_eighty_columns() {
        let text = example().render(Paint::default());
        insta::assert_snapshot!(text, @r"
        Found    40 pictures in photos (flat folder, .txt captions)
                 38 used · 2 skipped: IMG_2210.jpg (truncated JPEG), ban\u{1b}ner.psd
                 (not a picture)
                 3 without caption · 5 turned by EXIF · buckets 512×512 ×22, 448×576 ×16
        Base     Stable Diffusion 1.x, 860 M parameters, fp16 files
        Adapter  LoRA rank 16, alpha 16 on attention+ff of the UNet: 192 modules, 6.4 M
                 parameters, file ≈ 12.2 MiB
        Plan     1 500 steps (157.9 epochs), batch 1 × accum 4, AdamW lr 1e-4, cosine
                 after 75 steps of warm-up, cuda:0, bf16, seed 42
        Memory   ≈ 3.1 GiB of 11.0 GiB free (weights 2.0 GiB, activations 1.0 GiB,
                 optimizer 73.4 MiB, cache 879 KiB)
        Time     preparing ≈ 61 s · training is timed after step 5
        Output   runs/photos-1 · save every 150 (keep 2) · sample every 150 · stop with
                 Ctrl-C, resume any time
        ");
        assert!(text.lines().all(|line| text::width(line) <= 80));
    }

    #[test]
    fn the_json_form_keeps_the_contract() {
        let json = serde_json::to_value(example()).unwrap();
        assert_eq!(json["data"]["used"], 38);
        assert_eq!(json["data"]["skipped"][0]["reason"], "truncated JPEG");
        assert_eq!(json["trainable_parameters"], 6_380_000);
        assert_eq!(json["steps"], 1500);
        assert!(
            json["memory_bytes"]["total"].is_u64() && json["seconds"]["prepare"].is_f64() && json["base"].is_string()
        );
        assert_eq!(serde_json::from_value::<Plan>(json).unwrap(), example());
    }
}
