"""Recipes for corpora of a few hundred characters."""

from __future__ import annotations

from dataclasses import replace

from nas.planning.recipe import TEXT, TEXT_BPE

SMALL = replace(TEXT, context=4, min_validation_samples=13)
SMALL_BPE = replace(TEXT_BPE, context=4, min_validation_samples=13, vocabulary=300)
