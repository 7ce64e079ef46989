"""The table of methods. Nothing registers itself: a paper is here or it does not exist."""

from trl_ext.method import Method
from trl_ext.methods.dpo.bco import Bco
from trl_ext.methods.dpo.dno import Dno
from trl_ext.methods.dpo.nesterov import Nesterov
from trl_ext.methods.grpo.capo import Capo
from trl_ext.methods.grpo.d3s import D3S
from trl_ext.methods.grpo.dcpo import Dcpo
from trl_ext.methods.grpo.dgpo import Dgpo
from trl_ext.methods.grpo.dynamic_sampling import DynamicSampling
from trl_ext.methods.grpo.epo import Epo
from trl_ext.methods.grpo.fg_expo import FgExpo
from trl_ext.methods.grpo.fgrpo import Fgrpo
from trl_ext.methods.grpo.group_dpo import GroupDpo
from trl_ext.methods.grpo.hdpo import Hdpo
from trl_ext.methods.grpo.high_entropy import HighEntropy
from trl_ext.methods.grpo.mdpo import Mdpo
from trl_ext.methods.grpo.oblr_po import OblrPo
from trl_ext.methods.grpo.otc import Otc
from trl_ext.methods.grpo.paced import Paced
from trl_ext.methods.grpo.pgpo import Pgpo
from trl_ext.methods.grpo.real import Real
from trl_ext.methods.grpo.riskpo import RiskPO
from trl_ext.methods.grpo.rods import Rods
from trl_ext.methods.grpo.safe import Safe
from trl_ext.methods.grpo.scaf_grpo import ScafGrpo
from trl_ext.methods.grpo.target_surrogate import TargetSurrogate
from trl_ext.methods.grpo.trace import Trace
from trl_ext.methods.grpo.velocity_rank import VelocityRank

METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        HighEntropy,
        Trace,
        Dgpo,
        Dcpo,
        Capo,
        VelocityRank,
        Pgpo,
        D3S,
        Epo,
        RiskPO,
        OblrPo,
        Real,
        GroupDpo,
        FgExpo,
        Paced,
        Mdpo,
        TargetSurrogate,
        Safe,
        ScafGrpo,
        DynamicSampling,
        Otc,
        Hdpo,
        Fgrpo,
        Rods,
        Bco,
        Dno,
        Nesterov,
    )
}
