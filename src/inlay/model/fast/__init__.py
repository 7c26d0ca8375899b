"""Fast paths inside a model, put there by `attach` and taken off by `detach`.

Modules change their class in place, as adapted layers do, so that whoever calls the model, by hand,
by transformers' Trainer or by TRL, takes these paths. A module is changed only when its source is
the computation that the fast path does; whatever is not met runs as transformers wrote it. Each
path can be switched off (`kernels.switches`), and is looked up at every call.
"""
