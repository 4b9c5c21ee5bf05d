"""Other people's files, described as manifests over them: so the one loader there is reads them, too.

    open.py         what a path holds, and who reads it
    dcp.py          torch.distributed.checkpoint: `.metadata` and `.distcp`
    torchfile.py    torch.save's zip: `.pt` files, and every record of a DCP directory
    safetensors.py  single files, Hugging Face directories, and those that DCP writes
    described.py    a tree of located tensors -> a Checkpoint
    dcp_write.py    the other way round: a Checkpoint -> a DCP directory

Invariant: nothing of a file is imported, called or believed. Pickles are read through an allow-list of inert
stand-ins (pickles.py), offsets are checked against the file, and no index leads out of its directory.
"""
