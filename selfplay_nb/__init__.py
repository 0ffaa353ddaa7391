__version__ = "0.1.0"

import logging


def _is_news(record) -> bool:
    "On some CPUs bitsandbytes looks for a package that is not needed here, and its line reads like a broken installation."
    return "gemm_4bit_forward" not in record.getMessage()

logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_news)

# The names that users come for, imported when they are first asked for: nothing here needs torch before that.
_WHERE = {
    "policy": "Base Policy",
    "protocols": "Player Reward Judge Task Game as_player as_reward as_judge as_task as_game",
    "players": "Scripted",
    "tasks": "ArithmeticTask PromptTask",
    "reward": "WeightedReward exact_number near_number format_reward coin_flip",
    "judge": "RewardJudge RuleJudge ModelJudge Panel",
    "reward_model": "RewardModel",
    "pairs": "Ledger load_rows validate_pairs",
    "competitive": "CompetitiveSelfPlay Preferences",
    "refinement": "IterativeRefiner Trace Traces",
    "constitutional": "ConstitutionalRewardWrapper",
    "skill": "SkillConditioning",
    "adversarial": "AdversarialFilter",
    "league": "LeagueTraining PolicySnapshot",
    "games": "OpenSpielGame TextArenaGame RandomPlayer MinimaxBot play",
    "game_training": "Sticks advantages position_pairs",
    "rounds": "Experience Compete Refine Groups GameTask GameMoves GamePairs",
    "trainer": "SelfPlayConfig SelfPlayTrainer",
    "pipeline": "RLHFOrchestrator combine",
    "update": "dpo sft reinforce",
    "evaluation": "examine versus compare Exam Comparison Match",
    "rates": "Rate SPRT win_rate",
    "stepper": "RefinementStepper",
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names.split()}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'selfplay_nb' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f"selfplay_nb.{_MODULE_OF[name]}"), name)


def __dir__():
    return [*globals(), *__all__]
