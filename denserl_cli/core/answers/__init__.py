"""Answers for AlpacaEval 2, Arena-Hard and MT-Bench, in the files that their judges read."""
