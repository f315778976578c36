"""Named groups of constants: PRESET=paper, or several, PRESET=toy,single_turn. A name without a file is ppo.py's."""

from typing import Any

SCORE = {  # SCoRe (arXiv 2409.12917): two attempts, no verdict between them, each paid for itself
    "rollout.MIN_ATTEMPTS": 2,
    "rollout.MAX_ATTEMPTS": 2,
    "rollout.PROMPT": "single_turn",
    "rollout.FEEDBACK": "intrinsic",
    "rollout.REWARD_WRONG": 0.0,
    "rollout.REWARD_NO_ANSWER": 0.0,
    "rollout.SAMPLES_PER_PROMPT": 4,
    "ESTIMATOR": "rloo",
    "ATTEMPT_GAMMA": 0.0,
    "LOSS_MEAN": "constant",  # REINFORCE sums over the tokens of an attempt
    "WHITEN": False,
    "ENTROPY_COEF": 0.0,
}
SCORE_CODE = {  # table 8; its 1500 steps are those of both stages, and how they are divided is not said
    "TRAIN_DATA": "data/mbpp_train.jsonl",
    "ACTOR_LR": 1e-5,
    "DIALOGUES": 128,
    "MINI_BATCH": 128,
    "DEV_PROBLEMS": 0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},  # the constants as they stand
    "toy": {
        "MODEL": "data/toy/warm_start",
        "TRAIN_DATA": "data/toy/train.jsonl",
        "SEED": 0,
        "STEPS": 0,
        "TOKEN_BUDGET": 400_000,
        "DIALOGUES": 128,
        "MINI_BATCH": 64,
        "EPOCHS": 2,
        # First answers are held near the warm start's, as in SCoRe's stage I, so that the first attempt does not pay
        # for the others. The entropy bonus keeps answers varied, but it also pays for junk around the box, where
        # anything may be said; the KL must cost more.
        "KL_COEF": (0.2, 0.02),
        "ENTROPY_COEF": 0.01,
        "ACTOR_LR": 1e-3,
        "CRITIC_LR": 2e-3,
        "MIN_LR": 0.0,
        "WARMUP": 0.0125,
        "COMPUTE_DTYPE": "float32",
        "SAVE_EVERY": 50,
        "rollout.MAX_ATTEMPT_TOKENS": 64,
        "ranks.GRADIENT_CHECKPOINTING": False,
        "packing.MAX_TOKENS_PER_MICRO_BATCH": 4096,
        "logs.TRACK": "",
    },
    "single_turn": {"rollout.MAX_ATTEMPTS": 1},  # the paper's baseline
    # the plain method that SCoRe improves on (eq. 1)
    "multi_turn": SCORE | {"rollout.REWARD": "per_attempt", "KL_COEF": (0.01,)},
    "score_stage1": SCORE | {"rollout.REWARD": "score_stage1", "KL_COEF": (0.1, 0.01)},  # beta2, beta1 of table 8
    # the same on programs, such as data/mbpp_train.jsonl (table 8)
    "score_code_stage1": SCORE | SCORE_CODE | {"rollout.REWARD": "score_stage1", "KL_COEF": (0.25, 0.01)},
    "score_code_stage2": SCORE | SCORE_CODE | {"rollout.REWARD": "score_stage2", "KL_COEF": (0.01,)},
    # MODEL=<the first stage's policy> REFERENCE=<what the first stage started from>
    "score_stage2": SCORE | {"rollout.REWARD": "score_stage2", "KL_COEF": (0.01,)},
}
