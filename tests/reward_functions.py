"""A reward function as a user writes it: ten lines in a file of their own."""


def variety(segments, terminated):
    """One for each segment that is new in its response; a response that does not end earns less."""
    rewards = []
    for pieces, ended in zip(segments, terminated, strict=True):
        texts = [piece.text.strip() for piece in pieces]
        new = [float(text not in texts[:place]) for place, text in enumerate(texts)]
        rewards.append(new if ended else [0.5 * one for one in new])
    return rewards
