__version__ = "0.1.0"

import logging


def _is_news(record) -> bool:
    "On some CPUs bitsandbytes looks for a package that is not needed here, and its line reads like a broken installation."
    return "gemm_4bit_forward" not in record.getMessage()

logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_news)

# The names that users come for, imported when they are first asked for: nothing here needs torch before that.
_WHERE = {
    "models.policy": "Base Policy",
    "core.protocols": "Player Reward Judge Task Game",
    "core.players": "Scripted as_player",
    "tasks.task": "ArithmeticTask PromptTask as_task",
    "scoring.reward": "as_reward WeightedReward exact_number near_number format_reward random_reward",
    "scoring.judge": "as_judge RewardJudge RuleJudge ModelJudge Panel",
    "models.reward_model": "RewardModel",
    "core.pairs": "Ledger load_rows validate_pairs",
    "methods.competitive": "CompetitiveSelfPlay Preferences",
    "methods.refinement": "IterativeRefiner Trace Traces",
    "methods.constitutional": "ConstitutionalRewardWrapper",
    "methods.skill": "SkillConditioning",
    "methods.adversarial": "AdversarialFilter",
    "methods.league": "LeagueTraining PolicySnapshot",
    "games.play": "OpenSpielGame TextArenaGame RandomPlayer MinimaxBot play",
    "methods.game_training": "Sticks advantages position_pairs",
    "loop.rounds": "Experience Compete Refine Groups",
    "loop.collectors": "Screen Levels Propose Shares",
    "loop.game_rounds": "as_game GameTask GameMoves GamePairs",
    "loop.trainer": "SelfPlayConfig SelfPlayTrainer",
    "loop.pipeline": "RLHFOrchestrator combine",
    "models.update": "dpo sft reinforce",
    "scoring.evaluation": "evaluate versus compare Evaluation Comparison Match",
    "stats.rates": "Rate SPRT win_rate",
    "views.refinement_stepper": "RefinementStepper",
    "scale.endpoint": "Endpoint",
    "scale.server": "Served Server",
    "scale.workers": "Spread SpreadPlayer Workers",
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
