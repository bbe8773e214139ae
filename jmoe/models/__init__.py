"""Whole networks and their named variants."""

from jmoe.models import vit as vit
