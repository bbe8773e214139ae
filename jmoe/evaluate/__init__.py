"""Evaluation of a trained model."""

from jmoe.evaluate.accuracy import Evaluation as Evaluation
from jmoe.evaluate.accuracy import evaluate as evaluate
from jmoe.evaluate.fewshot import FewShotResult as FewShotResult
from jmoe.evaluate.fewshot import few_shot_accuracy as few_shot_accuracy
