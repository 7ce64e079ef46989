"""The table of methods. Nothing registers itself: a paper is here or it does not exist."""

from trl_ext.method import Method
from trl_ext.methods.grpo.capo import Capo
from trl_ext.methods.grpo.d3s import D3S
from trl_ext.methods.grpo.dcpo import Dcpo
from trl_ext.methods.grpo.dgpo import Dgpo
from trl_ext.methods.grpo.epo import Epo
from trl_ext.methods.grpo.high_entropy import HighEntropy
from trl_ext.methods.grpo.pgpo import Pgpo
from trl_ext.methods.grpo.trace import Trace
from trl_ext.methods.grpo.velocity_rank import VelocityRank

METHODS: dict[str, type[Method]] = {
    cls.name: cls for cls in (HighEntropy, Trace, Dgpo, Dcpo, Capo, VelocityRank, Pgpo, D3S, Epo)
}
