"""What happens to the requests of a ``World``, at random, and how it has to end."""

from __future__ import annotations

from tests.adapter.kv_world import Life, World

EVENTS = {"arrive", "step", "miss", "preempt", "resume", "abort", "finish", "go on"}


def event(world: World) -> Life:
    """Something happens to a request: which one."""
    source = world.source
    if len(world.lives) < 6 or (len(world.lives) < 9 and source.random() < 0.1):
        world.arrive()
    life = source.choice(world.lives)
    chance = source.random()
    if life.is_running and chance < 0.01:
        world.stop(life, "abort")
    elif life.is_running and chance < 0.02:
        world.stop(life, "preempt")
    else:
        world.step(life)
    return life


def end(world: World) -> None:
    """Everybody leaves; nothing leaks."""
    for life in list(world.lives):
        if life.is_running:
            world.stop(life, "abort")
    world.routes.begin()
    assert world.routes.known() <= {life.request.request_id for life in world.lives}
    pool = world.manager.block_pool
    assert pool.get_num_free_blocks() == world.num_blocks - 1
    assert all(block.ref_cnt == 0 for block in pool.blocks if not block.is_null)
