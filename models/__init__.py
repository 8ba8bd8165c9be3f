"""The networks, in flax.linen."""

from models.attention import Attention as Attention
from models.convolution import Conv as Conv
from models.convolution import conv as conv
from models.convolutional import ConvNet as ConvNet
from models.gcn import GCN as GCN
from models.gcn import GraphConv as GraphConv
from models.graph_transformer import GraphTransformer as GraphTransformer
from models.language_model import LanguageModel as LanguageModel
from models.mlp import MLP as MLP
from models.resnet import ResNet as ResNet
from models.vision_transformer import VisionTransformer as VisionTransformer
from models.wide_resnet import WideResNet as WideResNet
