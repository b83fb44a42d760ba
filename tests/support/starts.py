"""What each start of an engine is asked."""

from qnext_plugin.verify.runner import Run, passes
from tests.support.installed import MUTANTS
from tests.support.matrix import CONFIGS, SCENARIOS, scenarios_of


def runs(config: str) -> list[Run]:
    """The scenarios of a configuration, where it is ``warm`` once more on the warm cache, then its mutants."""
    broken = [mutant for mutant in MUTANTS if mutant.config == config]
    return passes(CONFIGS[config], scenarios_of(config)) + [
        Run(mutant.name, SCENARIOS[mutant.scenario], mutant.path) for mutant in broken
    ]
