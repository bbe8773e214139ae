"""Standalone accelerator ops of sparse layers; imports jax and nothing of jmoe."""
