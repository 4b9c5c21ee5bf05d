"""Imported by a server of ranks, so that they have imported transformers and accelerate when they start."""

import tests.integrations.test_accelerate
import tests.integrations.test_transformers  # noqa: F401
