#!/usr/bin/env python3
"""Train the models that ship with Baton: small ones that recall a number from a list.

The prompt is a list of names and numbers and ends with a question::

    ada 4127, bob 9083, cleo 0551; bob?

and the greedy answer is `` 9083`` followed by the end-of-sequence token.  Nothing in the weights
knows the number: it has to come out of the KV cache of the prompt, which makes such a model a cheap
check of a system that moves this cache between workers.  ``--evaluate DIR --damage`` measures how
many answers a damaged cache spoils.

The script makes its own data, trains the tokenizer and the model, measures the result on fresh
lists through ``transformers`` ``generate`` and writes a checkpoint in Hugging Face format::

    python deploy/models/train_recall.py --out deploy/models/recall      # train, evaluate, save
    python deploy/models/train_recall.py --architecture mla --out deploy/models/recall-mla
    python deploy/models/train_recall.py --evaluate deploy/models/recall # evaluate only

It needs torch, transformers, tokenizers and safetensors, and takes minutes on a GPU.  Its parts are
in ``recall_training/``.
"""

from __future__ import annotations

import sys

from recall_training.command_line import main

if __name__ == "__main__":
    sys.exit(main())
