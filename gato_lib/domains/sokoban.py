"""Sokoban: push every box onto a target, seen as pixels (paper 3.1, Table 1, App. F).

The rules and rewards are those of gym-sokoban and Boxoban. Rooms are our own: floor carved by a
random walk, then played in reverse (boxes are pulled off their targets), so each has a solution;
only rooms that the expert solves well within the step limit are used. A cell is 8 x 8 pixels, so a
16 x 16 patch holds exactly 2 x 2 cells and a step of the 10 x 10 room costs 25 patches.

Cells are numbered row by row. The border is always wall, so a move is the addition of an offset
and never wraps around.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import math
from collections.abc import Set
from typing import Any

import gymnasium as gym
import numpy as np

from gato_lib.domains.base import Domain, Expert, ExpertError, TaskSpec

MAX_STEPS = 120
EASY_STEPS = 100  # rooms whose known solution is longer are not used: noise needs room, too
ROOM_NODES = 1000  # ... nor are those that take the solver longer than this
EXPERT_NODES = 30_000

CELL = 8
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))  # up, down, left, right

STEP_REWARD, BOX_REWARD, SOLVED_REWARD = -0.1, 1.0, 10.0

_ROOMS = {"8x8-2": (8, 2), "10x10-4": (10, 4)}  # name -> cells a side, boxes


@dataclasses.dataclass
class Board:
    """A room and where its boxes and its player are."""

    size: int
    walls: tuple[bool, ...]
    targets: frozenset[int]
    boxes: frozenset[int]
    player: int

    @property
    def offsets(self) -> tuple[int, ...]:
        """What each move adds to a cell's number."""
        return tuple(row * self.size + column for row, column in MOVES)

    @property
    def solved(self) -> bool:
        return self.boxes == self.targets

    def pushes(self, action: int) -> bool:
        """Whether the action would push a box."""
        offset = self.offsets[action]
        front, beyond = self.player + offset, self.player + 2 * offset
        return front in self.boxes and not self.walls[beyond] and beyond not in self.boxes

    def move(self, action: int) -> None:
        """Step, push, or stay where a wall or a stuck box is in the way."""
        offset = self.offsets[action]
        front = self.player + offset
        if self.pushes(action):
            self.boxes = self.boxes - {front} | {front + offset}
        if not self.walls[front] and front not in self.boxes:
            self.player = front


def reachable(board: Board, boxes: Set[int], start: int) -> dict[int, int]:
    """The cells to which the player can walk from `start`, each with the steps it takes."""
    walls, offsets = board.walls, board.offsets
    steps = {start: 0}
    queue = [start]
    for cell in queue:
        for offset in offsets:
            near = cell + offset
            if near not in steps and not walls[near] and near not in boxes:
                steps[near] = steps[cell] + 1
                queue.append(near)
    return steps


def walk(board: Board, boxes: Set[int], start: int, goal: int) -> list[int]:
    """A shortest walk that pushes nothing; KeyError where there is none."""
    steps = reachable(board, boxes, start)
    path = []
    while steps[goal]:
        for move, offset in enumerate(board.offsets):
            if steps.get(goal - offset, math.inf) < steps[goal]:
                path.append(move)
                goal -= offset
                break
    return path[::-1]


def push_distances(board: Board) -> dict[int, tuple[float, ...]]:
    """Pushes that bring a lone box from a cell to each target; a cell left out is a dead end."""
    distances: dict[int, list[float]] = {}
    targets = sorted(board.targets)
    for i, target in enumerate(targets):
        found = {target: 0}
        queue = [target]
        for cell in queue:  # pulled backwards: the puller needs the cell beyond to be free as well
            for offset in board.offsets:
                before = cell - offset
                if before not in found and not board.walls[before]:
                    if board.walls[before - offset]:
                        continue
                    found[before] = found[cell] + 1
                    queue.append(before)
        for cell, distance in found.items():
            distances.setdefault(cell, [math.inf] * len(targets))[i] = distance
    return {cell: tuple(row) for cell, row in distances.items()}


def assignment(rows: list[tuple[float, ...]]) -> float:
    """Least sum of one entry from each row, all from different columns."""
    best = {0: 0.0}  # columns taken, as bits -> least sum so far
    for row in rows:
        following: dict[int, float] = {}
        for taken, total in best.items():
            for column, distance in enumerate(row):
                bit = 1 << column
                if not taken & bit and total + distance < following.get(taken | bit, math.inf):
                    following[taken | bit] = total + distance
        best = following
    return min(best.values(), default=math.inf)


def solve(board: Board, nodes: int, weight: float = 3.0) -> list[tuple[int, int]] | None:
    """Weighted A*: a plan of pushes, as (box, move) in order, or None within `nodes` expansions.

    Its cost is all steps, walks included. A state is where the boxes are and which region the
    player walks in, reached first; where in it the player stands is not told apart. The heuristic
    assigns boxes to targets by the pushes that each would need alone. Walking is most of the cost,
    so it is far below the truth, and a weight of 3 costs few steps: on rooms of 4 boxes 39 instead
    of 35 at weight 1, for a fortieth of the time.
    """
    distances = push_distances(board)

    @functools.cache
    def pushes_left(boxes: frozenset[int]) -> float:
        if any(box not in distances for box in boxes):
            return math.inf
        return assignment([distances[box] for box in boxes])

    # (priority, order of discovery, steps so far, boxes, player). `made_by` has, for each entry in
    # that order, the one it came from and the push that led to it.
    heap = [(weight * pushes_left(board.boxes), 0, 0, board.boxes, board.player)]
    made_by: list[tuple[int, int, int]] = [(-1, -1, -1)]
    closed = set()
    moves = tuple(enumerate(board.offsets))
    while heap and len(closed) < nodes:
        _, entry, steps, boxes, player = heapq.heappop(heap)
        if boxes == board.targets:
            plan = []
            while entry:
                entry, box, move = made_by[entry]
                plan.append((box, move))
            return plan[::-1]
        region = reachable(board, boxes, player)
        state = (boxes, min(region))
        if state in closed:
            continue
        closed.add(state)
        for box in boxes:
            for move, offset in moves:
                behind, ahead = box - offset, box + offset
                if behind not in region or ahead not in distances or ahead in boxes:
                    continue
                pushed = boxes - {box} | {ahead}
                left = pushes_left(pushed)
                if math.isinf(left):
                    continue
                cost = steps + region[behind] + 1
                heapq.heappush(heap, (cost + weight * left, len(made_by), cost, pushed, box))
                made_by.append((entry, box, move))
    return None


def solution_actions(board: Board, plan: list[tuple[int, int]]) -> list[int]:
    """A push plan with the walks between its pushes."""
    actions, boxes, player = [], board.boxes, board.player
    for box, move in plan:
        offset = board.offsets[move]
        actions += [*walk(board, boxes, player, box - offset), move]
        boxes, player = boxes - {box} | {box + offset}, box
    return actions


# What the carving walk digs out around itself; with single cells, corridors would be too narrow
# to push boxes around corners.
_BRUSHES = (
    ((0, 0), (0, 1), (0, -1)),
    ((0, 0), (1, 0), (-1, 0)),
    ((0, 0), (0, 1), (1, 0)),
    ((0, 0), (1, 0), (0, -1), (1, -1)),
    ((0, 0), (0, 1), (1, 0), (1, 1)),
)


def _carve(rng: np.random.Generator, size: int) -> tuple[bool, ...]:
    """Walls left by a random walk of 3.4 `size` steps that turns at a third of them."""
    wall = np.ones((size, size), bool)
    cell = rng.integers(2, size - 2, 2)
    move = rng.integers(4)
    for _ in range(round(3.4 * size)):
        if rng.random() < 0.35:
            move = rng.integers(4)
        cell = np.clip(cell + MOVES[move], 1, size - 2)
        for offset in _BRUSHES[rng.integers(len(_BRUSHES))]:
            row, column = cell + offset
            if 0 < row < size - 1 and 0 < column < size - 1:
                wall[row, column] = False
    return tuple(wall.ravel().tolist())


def _play_backwards(rng: np.random.Generator, board: Board, pulls: int) -> Board | None:
    """Pull boxes at random from their targets; the arrangement farthest from being solved.

    None where the boxes never all left the targets.
    """
    distances = push_distances(board)
    boxes, player = set(board.boxes), board.player
    best, farthest = None, 0.0
    for _ in range(pulls):
        region = reachable(board, boxes, player)
        moves = [
            (box, offset)
            for box in sorted(boxes)
            for offset in board.offsets
            if box + offset in region
            and not board.walls[box + 2 * offset]
            and box + 2 * offset not in boxes
        ]
        if not moves:
            break
        box, offset = moves[rng.integers(len(moves))]
        boxes.remove(box)
        boxes.add(box + offset)
        player = box + 2 * offset
        if not boxes & board.targets:
            distance = assignment([distances[box] for box in boxes])
            if distance > farthest:
                best, farthest = (frozenset(boxes), player), distance
    return best and dataclasses.replace(board, boxes=best[0], player=best[1])


def generate(rng: np.random.Generator, size: int, boxes: int) -> Board:
    """A room with no box on a target and a known solution of 3 pushes a box or more."""
    while True:
        walls = _carve(rng, size)
        floor = [cell for cell, wall in enumerate(walls) if not wall]
        if len(floor) < 4 * boxes + 6:
            continue
        *targets, player = rng.choice(floor, boxes + 1, replace=False).tolist()
        solved = Board(size, walls, frozenset(targets), frozenset(targets), player)
        board = _play_backwards(rng, solved, 40 * boxes)
        plan = board and solve(board, ROOM_NODES)
        if plan and len(plan) >= 3 * boxes and len(solution_actions(board, plan)) <= EASY_STEPS:
            return board


@functools.cache
def _tiles() -> np.ndarray:
    """(7, 8, 8, 3): floor, wall, target, box, box on target, player, player on target."""
    row, column = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    tiles = np.zeros((7, CELL, CELL, 3), np.uint8)
    tiles[:] = (40, 36, 32)
    tiles[1] = (140, 84, 52)
    tiles[1, 3::4] = (92, 54, 34)  # mortar
    tiles[[2, 4, 6]] = np.where(
        (np.abs(row) + np.abs(column) < 4)[..., None], (190, 50, 60), tiles[0]
    )
    edge = np.maximum(np.abs(row), np.abs(column))
    for tile, color in ((3, (220, 180, 70)), (4, (90, 210, 90))):
        tiles[tile][edge < 3.6] = color
        tiles[tile][edge < 2] = np.array(color) // 2
    for tile, color in ((5, (90, 140, 255)), (6, (190, 130, 255))):
        tiles[tile][np.hypot(row, column) < 3.2] = color
    return tiles


def draw(board: Board) -> np.ndarray:
    """(8 size, 8 size, 3) uint8."""
    kinds = np.array(board.walls, np.intp)
    targets, boxes = sorted(board.targets), sorted(board.boxes)
    kinds[targets] = 2
    kinds[boxes] = [4 if box in board.targets else 3 for box in boxes]
    kinds[board.player] = 6 if board.player in board.targets else 5
    side = board.size * CELL
    grid = _tiles()[kinds.reshape(board.size, board.size)]  # rows, columns, 8, 8, 3
    return grid.swapaxes(1, 2).reshape(side, side, 3)


class Sokoban(gym.Env):
    """Rewards: -0.1 a step, +1 for a box onto a target, -1 for one off it, +10 when solved."""

    def __init__(self, size: int, boxes: int):
        self._size, self._boxes = size, boxes
        side = size * CELL
        self.observation_space = gym.spaces.Dict(
            {"image": gym.spaces.Box(0, 255, (side, side, 3), np.uint8)}
        )
        self.action_space = gym.spaces.Discrete(len(MOVES))

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.board = generate(self.np_random, self._size, self._boxes)
        self._steps = 0
        return {"image": draw(self.board)}, {}

    def step(self, action: int):
        board = self.board
        before = len(board.boxes & board.targets)
        board.move(int(action))
        self._steps += 1
        reward = STEP_REWARD + BOX_REWARD * (len(board.boxes & board.targets) - before)
        reward += SOLVED_REWARD * board.solved
        truncated = self._steps >= MAX_STEPS
        return {"image": draw(board)}, float(reward), board.solved, truncated, {}


class Solver(Expert):
    """Follows a plan of pushes, walking to each by the shortest way from wherever it stands.

    It plans anew only when the boxes are not where the plan has them, so it copes with any action
    executed in its stead, as long as the room can still be solved.
    """

    def reset(self, env: gym.Env) -> None:
        self._env = env.unwrapped
        self._plan: list[tuple[int, int]] = []
        self._boxes: frozenset[int] | None = None  # as the first push of the plan needs them

    def act(self, observation: Any, executed: Any | None) -> int:
        board = self._env.board
        if self._plan:  # was its first push made?
            box, move = self._plan[0]
            pushed = self._boxes - {box} | {box + board.offsets[move]}
            if board.boxes == pushed:
                self._plan, self._boxes = self._plan[1:], pushed
        if not self._plan or board.boxes != self._boxes:
            self._plan, self._boxes = solve(board, EXPERT_NODES), board.boxes
            if not self._plan:
                raise ExpertError("no solution found")
        box, move = self._plan[0]
        return (*walk(board, board.boxes, board.player, box - board.offsets[move]), move)[0]


def perturb(action: int, noise: float, env: gym.Env, rng: np.random.Generator) -> int:
    """Random moves, but none that pushes a box: one wrong push can make a room unsolvable."""
    if rng.random() >= noise:
        return action
    harmless = [a for a in range(len(MOVES)) if not env.unwrapped.board.pushes(a)]
    return int(rng.choice(harmless)) if harmless else action


DOMAINS = (
    Domain(
        name="sokoban",
        tasks={
            f"sokoban/{name}": TaskSpec(
                id=f"sokoban/{name}",
                metric="return",
                floor=10.0,
                floor_source=(
                    f"the reward for solving; the bound is 10 + {boxes} boxes - 0.1 a step"
                ),
                noise="share of actions replaced by a random move that pushes no box",
                expert="weighted A* over pushes, from what the image shows",
            )
            for name, (_, boxes) in _ROOMS.items()
        },
        make_env=lambda name: Sokoban(*_ROOMS[name]),
        make_expert=lambda name: Solver(),
        sources=("sokoban.py",),
        perturb=perturb,
    ),
)
