"""Answers for AlpacaEval 2, Arena-Hard v0.1 and MT-Bench, in the files that their judges read."""
