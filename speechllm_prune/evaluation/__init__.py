"""Scoring of hypotheses, statistics of scores, time and memory."""
