"""Fast paths inside a model, put there by `attach` and taken off by `detach`.

Modules change their class in place, as adapted layers do, so that whoever calls the model, by hand,
by transformers' Trainer or by TRL, takes these paths. A class's source says where a path is worth
trying (`hints`); it is put on once a trial on a small twin agrees in values and gradients (`proof`,
`trials`, `shrink`), and whatever does not agree runs as transformers wrote it. Each path can be
switched off (`kernels.switches`), and is looked up at every call.
"""
