"""Fast paths inside a model, put there by `attach` and taken off by `detach`.

Modules change their class in place, as adapted layers do, so that a hand-written loop,
transformers' Trainer and TRL all use these paths. A class's source says where a path is worth
trying (`hints`). It is installed once a trial on a small twin agrees in values and gradients
(`proof`, `trials`, `shrink`); whatever does not agree runs as transformers wrote it. Each path has
a switch (`kernels.switches`), which is read at every call.
"""
