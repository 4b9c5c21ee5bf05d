"""Live DeepSpeed engines: what of theirs is whose, read and written where it lies. See docs/deepspeed.md.

An engine keeps fp32 master weights in flat buffers that ranks share out. What is read here is private to DeepSpeed,
checked at 0.19.8; `private` guards each name. DeepSpeed is never imported: an engine exists only where it was.
Its own mappings from parameters to masters (`param_slice_mappings`, `_hp_mapping`, `safe_get_full_*`) are not used:
with `round_robin_gradients` they are scrambled.

    engine.py      what an engine is, which parts of it there are, which setups cannot be saved
    flats.py       its parameters as slots
    stages.py      weights that several stages of a pipeline use
    experts.py     names of experts, of which each rank has some
    refresh.py     working weights from masters that a load has filled
    counters.py    steps, samples, loss scale
"""
