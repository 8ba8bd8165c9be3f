"""The networks, in flax.linen."""

from models.gcn import GCN as GCN
from models.gcn import GraphConv as GraphConv
from models.mlp import MLP as MLP
