"""Texts of recipes that are sound, for tests to add to and to spoil."""

MODEL = "model: {name_or_path: gpt2}\n"
DATA = "data: {datasets: dolly-15k}\n"
GOOD = MODEL + DATA  # a case that adds to it begins on line 3


FULL = (
    GOOD.replace(
        "dolly-15k", "[{name: alpaca, columns: {output: answer}}, {hub: a/b, split: 'train[:10%]', weight: 2}]"
    )
    + "adapter: {type: lora, target_modules: [q, v], rank_pattern: {q: 4}, init_lora_weights: pissa}\n"
    + "train: {report_to: [wandb, mlflow], lr_scheduler_kwargs: {a: {b: [1]}}, run_name: '1e-5', optim_args: 'a: b'}\n"
    + 'samples: ["no", "1e-5", "Grüße 👋", "two\\nlines", "  spaces ", "null", "~", "- a", "#", "1:30", "0x10"]\n'
    + "hub: {repo_id: a/b, push: end, path_in_repo: instruct/}\n"
)
