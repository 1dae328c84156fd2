import pytest

TINY = """
model:
  network: language/qwen3_moe_tiny
  overrides:
    hidden_size: 32
    num_hidden_layers: 2
    num_attention_heads: 2
    num_key_value_heads: 2
    head_dim: 16
    num_experts: 4
    num_experts_per_tok: 2
    moe_intermediate_size: 16
  losses: {switch: 0.01}
  schedule: constant
  warmup_steps: 3
  max_new_tokens: 8
data:
  source: "%s"
  tokenizer: bytes
  sequence_length: 32
  batch_size: 4
  prompts: ["def f"]
trainer:
  val_check_interval: 160
  check_val_every_n_epoch: null
  limit_val_batches: 2
  callbacks:
    - class_path: tasks.averaging.RunningAverage
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A demo's configuration of a model that trains in milliseconds, on 40 short files."""
    monkeypatch.setenv("MOE_ZOO_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i} if x > {i * i} else None\n\n\n" * 5)
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY % text)
    return path
