"""Which of a node's devices a trial takes when it needs fewer than there are: others in every repeat."""


def rotated(turn: int, count: int, there: int) -> list[int]:
    """Return `count` different devices out of 0 … `there` - 1, in order: the first ones in turn 0.

    The node is cut into equal blocks, the smallest that hold `count` devices, because neighbours share NUMA nodes,
    switches and links: three of eight stay within a half of them. Each turn takes the next block. A block with more
    devices than are needed gives others in each round, so that every device has its turn.
    """
    if count >= there:
        return list(range(count))
    block = next(size for size in range(count, there + 1) if there % size == 0)
    rounds, place = divmod(turn, there // block)
    return sorted(place * block + (rounds + index) % block for index in range(count))
