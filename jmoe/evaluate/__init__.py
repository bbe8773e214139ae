"""Evaluation of a trained model."""

from jmoe.evaluate.accuracy import Evaluation as Evaluation
from jmoe.evaluate.accuracy import evaluate as evaluate
