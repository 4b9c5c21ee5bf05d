"""Imported by a server of ranks, so that they have imported DeepSpeed when they are forked."""

from tests import deepspeeds

deepspeeds.preload()
