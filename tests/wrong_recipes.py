"""Wrong recipes, made by hand: what is changed in a right one.

A case is `(name, old text, new text)`; where `old` is empty, `new` is the whole file.
`wrong_recipes.txt` says exactly what must be told about each.
"""

from __future__ import annotations

RIGHT = """\
# A right recipe: every case below breaks it in one way.
name: example
description: Two corpora, two kinds of layers.
seed: 1
data:
  corpora:
    plays: {type: files, paths: [plays/*.txt], weight: 2}
    python:
      type: python
      parts: [documentation]
      holdout: {type: fraction, fraction: 0.1}
  tokenizer:
    type: sentencepiece
    vocab_size: 512
model:
  dim: 64
  core:
    type: stack
    blocks:
      rwkv:
        mixer: {type: rwkv7, head_dim: 16}
        ffn: {type: channel_mix}
      attn:
        mixer: {type: attention, num_heads: 4}
        ffn: {type: swiglu, hidden_dim: 96}
    pattern: [rwkv, rwkv, attn]
train:
  steps: 100
  batch_size: 8
  optimizer:
    type: muon
    lr: 2e-2
  schedule: {type: wsd, warmup_steps: 10}
"""

CASES: list[tuple[str, str, str | bytes]] = [
    # the text is not YAML, or not YAML that a recipe may use
    ("empty file", "", ""),
    ("only comments", "", "# nothing\n"),
    ("list at the top", "", "- name: example\n"),
    ("text at the top", "", "quickstart\n"),
    ("byte order mark", "", b"\xef\xbb\xbfname: example\n"),
    ("utf-16", "", "name: example\n".encode("utf-16")),
    ("latin-1", "", "name: example\ndescription: caf\xe9\n".encode("latin-1")),
    ("control character", "", "name: example\ndescription: a\x1b[31m\n"),
    ("tab as indentation", "  dim: 64", "\tdim: 64"),
    ("tab after a colon", "  dim: 64", "  dim:\t64"),
    ("wrong indentation", "  dim: 64", "   dim: 64"),
    ("no space after a colon", "  dim: 64", "  dim:64"),
    ("no colon", "  dim: 64", "  dim 64\n  norm: rms_norm"),
    ("unclosed bracket", "[rwkv, rwkv, attn]", "[rwkv, rwkv, attn"),
    ("unclosed brace", "{type: wsd, warmup_steps: 10}", "{type: wsd, warmup_steps: 10"),
    ("unclosed quote", "name: example", 'name: "example'),
    ("glob without quotes", "[plays/*.txt]", "[*.txt]"),
    ("value with a percent sign", "name: example", "name: %example"),
    ("backslash in double quotes", "[plays/*.txt]", '["C:\\plays"]'),
    ("repeated key", "  dim: 64", "  dim: 64\n  dim: 32"),
    ("repeated section", "seed: 1", "seed: 1\nmodel: {dim: 8}"),
    ("anchor and alias", "{type: swiglu, hidden_dim: 96}", "&f {type: swiglu}"),
    ("alias", "ffn: {type: channel_mix}", "ffn: *mix"),
    ("merge key", "    type: muon", "    <<: {lr: 1}\n    type: muon"),
    ("tag", "seed: 1", "seed: !!python/object/apply:os.system [true]"),
    ("number as a key", "      attn:\n        mixer", "      1:\n        mixer"),
    ("second document", "train:", "---\ntrain:"),
    ("deep nesting", "seed: 1", "seed: " + "[" * 60 + "]" * 60),
    ("endless number", "seed: 1", "seed: " + "9" * 5000),
    ("seed past 63 bits", "seed: 1", "seed: 9223372036854775808"),
    # keys
    ("misspelt key", "    pattern: [", "    patern: ["),
    ("misspelt section", "model:", "modle:"),
    ("misspelt optional key", "warmup_steps", "warmup_step"),
    ("dash for underscore", "batch_size", "batch-size"),
    ("misspelt key in braces", "num_heads", "num_head"),
    ("key of another section", "  steps: 100", "  steps: 100\n  lr: 1e-3"),
    ("misspelt key of another section", "  dim: 64", "  dim: 64\n  patern: [rwkv]"),
    ("key of another type", "lr: 2e-2", "lr: 2e-2\n    betas: [0.9, 0.99]"),
    ("key from nowhere", "seed: 1", "seed: 1\nzzz: 1"),
    ("missing key", "  dim: 64\n", ""),
    ("missing section", "  steps: 100", "  # nothing"),
    ("missing key of a block", "        ffn: {type: channel_mix}\n", ""),
    ("empty section", "", "name: example\ndata:\nmodel:\ntrain:\n"),
    # types of unions
    ("misspelt type", "{type: rwkv7, head_dim: 16}", "{type: rwkv, head_dim: 16}"),
    ("unknown type", "type: muon", "type: lion"),
    ("missing type", "    type: muon\n", "    momentum: 0.9\n"),
    ("misspelt `type`", "{type: wsd,", "{tpye: wsd,"),
    ("unknown type of a core", "    type: stack", "    type: recurrent"),
    ("no type of a core", "    type: stack\n", ""),
    ("text for a section", "{type: channel_mix}", "channel_mix"),
    # values
    ("quoted number", "  dim: 64", '  dim: "64"'),
    ("underscores in a number", "  steps: 100", "  steps: 20_000"),
    ("exponent for a whole number", "  steps: 100", "  steps: 1e4"),
    ("fraction of a step", "  steps: 100", "  steps: 0.5"),
    ("ratio", "  steps: 100", "  steps: 3:1"),
    ("boolean for a number", "  steps: 100", "  steps: true"),
    ("number for a text", "name: example", "name: 2026"),
    ("not a number", "lr: 2e-2", "lr: .nan"),
    ("zero", "batch_size: 8", "batch_size: 0"),
    ("out of range", "fraction: 0.1", "fraction: 1.5"),
    ("wrong choice", "seed: 1", "device: gpu"),
    ("name of a run with a slash", "name: example", "name: runs/example"),
    ("text for a list", "[rwkv, rwkv, attn]", "rwkv"),
    ("empty list", "[rwkv, rwkv, attn]", "[]"),
    ("too many items", "lr: 2e-2", "lr: 2e-2\n    adamw: {betas: [0.9, 0.99, 0.999]}"),
    # keys that don't fit each other
    ("unknown block in the pattern", "[rwkv, rwkv, attn]", "[rwkv, rwkv, atn]"),
    ("block without use", "[rwkv, rwkv, attn]", "[rwkv]"),
    ("heads that don't divide", "num_heads: 4", "num_heads: 6"),
    ("vocabulary of its own", "  dim: 64", "  dim: 64\n  vocab_size: 1000"),
    ("accumulation that does not divide", "batch_size: 8", "batch_size: 8\n  grad_accum_steps: 3"),
    # several at once, in the order of the file
    (
        "three mistakes",
        "",
        RIGHT.replace("seed: 1", "sead: 1").replace("dim: 64", "dim: x").replace(": wsd", ": wsb"),
    ),
]
