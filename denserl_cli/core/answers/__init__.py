"""A policy's answers to benchmark questions, written in each benchmark's own format."""
