"""What a weight is, and which axes of it number the filters, in each framework.

A filter is all weights that feed one output: a unit, a channel, or a feature of a head
(Li et al., 2018). Adaptive perturbations ask which leaves are weights, and
filter-normalized directions also ask for their filters. One `Layout` answers both.

`automatic` knows flax.linen, flax.nnx, Equinox and plain pytrees; `rule` puts a
function of your own before it.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

Shape = tuple[int, ...]
# Classes of equinox.nn: parameters of a scale and a shift, and matrices.
_NOT_WEIGHTS = ('LayerNorm', 'GroupNorm', 'RMSNorm', 'BatchNorm', 'PReLU', 'WeightNorm')
_MATRICES = ('Linear', 'Embedding', 'GRUCell', 'LSTMCell')
# Names that leave open where the outputs are.
_NOT_LAST = r'(^|/)(Einsum_\d+/[^/]*|weight)$'
# The automatic names of flax.linen for lifted modules.
_STACKS = r'(^|/)(Scan|Vmap)[A-Z]'


class Leaf(NamedTuple):
  """What a parameter is.

  Attributes:
    is_weight: whether it is a weight, and not a bias or a parameter of a normalization.
    filter_axes: the axes whose indices number the filters, each of them a slice over
      all other axes; None if that is not known.
  """

  is_weight: bool
  filter_axes: tuple[int, ...] | None = None


class Parameter(NamedTuple):
  """What a rule is told of a leaf.

  Attributes:
    path: names from the root, joined by slashes: 'encoder/Dense_0/kernel'.
    shape: its shape, without stacked axes.
    bias: shape of the leaf called 'bias' next to it, without stacked axes; None if
      there is none.
    module: the Equinox module that holds it; None in trees of dicts.
  """

  path: str
  shape: Shape
  bias: Shape | None = None
  module: Any = None


Rule = Callable[[Parameter], Leaf | None]


@dataclasses.dataclass(frozen=True)
class Layout:
  """Says of every leaf of a tree whether it is a weight, and what its filters are.

  Made by `automatic`, `flax`, `equinox` and `rule`.

  Attributes:
    rules: functions from a `Parameter` to a `Leaf`. The first that does not answer
      None decides.
    stacked: from a regular expression, found in the paths of leaves that stack the
      parameters of several layers, to the axis or axes that number the layers.
  """

  rules: tuple[Rule, ...]
  stacked: Mapping[str, int | Shape] = dataclasses.field(default_factory=dict)

  def leaves(self, params: Any) -> list[tuple[str, Leaf]]:
    """Path and description of each leaf, in the order of `jax.tree.leaves`.

    Args:
      params: pytree of arrays, or of anything with a shape.

    Raises:
      ValueError: a rule gave no answer, or axes that the leaf does not have.

    >>> import jax.numpy as jnp
    >>> params = {'kernel': jnp.ones((3, 2, 4)), 'bias': jnp.ones((2, 4))}
    >>> for path, leaf in automatic().leaves(params):
    ...   print(path, leaf.is_weight, leaf.filter_axes)
    bias False None
    kernel True (1, 2)
    """
    found = _parameters(params)
    shapes = {p.path: p.shape for p in found}
    return [
      (p.path, self._leaf(p._replace(bias=shapes.get(_sibling(p.path))))) for p in found
    ]

  def weights(self, params: Any) -> Any:
    """A tree of bools like ``params``: which leaves are weights.

    Raises:
      ValueError: as `leaves`.
    """
    answers = [leaf.is_weight for _, leaf in self.leaves(params)]
    return jax.tree.unflatten(jax.tree.structure(params), answers)

  def __call__(self, params: Any) -> Any:
    """`weights`: a layout is a function from the parameters to a mask."""
    return self.weights(params)

  def unknown(self, params: Any) -> list[str]:
    """The paths of those weights whose filters are not known.

    Raises:
      ValueError: as `leaves`.
    """
    return [
      path
      for path, leaf in self.leaves(params)
      if leaf.is_weight and leaf.filter_axes is None
    ]

  def _leaf(self, parameter: Parameter) -> Leaf:
    stack = self._stack(parameter.path, parameter.shape)
    rest = [i for i in range(len(parameter.shape)) if i not in stack]
    bias = parameter.bias
    if bias is not None:
      drop = self._stack(_sibling(parameter.path), bias)
      bias = tuple(n for i, n in enumerate(bias) if i not in drop)
    inner = parameter._replace(shape=tuple(parameter.shape[i] for i in rest), bias=bias)
    answers = (rule(inner) for rule in self.rules)
    leaf = next((answer for answer in answers if answer is not None), None)
    if leaf is None:
      raise ValueError(
        f'layout: no rule knows {parameter.path} of shape {parameter.shape}: let the '
        'last rule answer for every leaf'
      )
    if leaf.filter_axes is None:
      return leaf
    axes = _normalized(leaf.filter_axes, len(rest), parameter)
    return leaf._replace(filter_axes=tuple(sorted({*stack, *(rest[a] for a in axes)})))

  def _stack(self, path: str, shape: Shape) -> set[int]:
    found = set()
    for pattern, axes in self.stacked.items():
      if re.search(pattern, path):
        axes = (axes,) if isinstance(axes, int) else axes
        found |= _normalized(axes, len(shape), Parameter(path, shape))
    return found


def automatic(*, stacked: Mapping[str, int | Shape] | None = None) -> Layout:
  """The layout of flax.linen, flax.nnx, Equinox and plain pytrees; the default.

  Equinox modules keep their classes in the tree, and a leaf of one of `equinox.nn` is
  what its class says. In other trees, in this order:

  * Leaves called bias or scale (also in ``rel_bias``), and those of fewer than two
    axes, are no weights. All others are.
  * The shape of the bias beside a kernel is found in the kernel's shape: these are the
    filter axes. Where it is found twice, the last axis is one of them.
  * Without a bias, the last axis numbers the filters of matrices, of kernels whose
    module is called conv, and of embeddings; with the axis of heads for a query, key or
    value of three axes. An automatic name ``Dense_0`` has stacked layers before its
    last two axes.
  * The filters of all else are not known, and `random_directions` raises an error.

  Path and shape do not tell these apart, so that the answer would be wrong without a
  `rule` or ``stacked``: a matrix of one's own that is used as ``w @ x``; a transposed
  or einsum kernel with as many inputs as outputs, whose outputs are not last; stacked
  layers whose number equals one of their sizes; a stack of vectors with a name of its
  own, which looks like a matrix; a stack of convolutions without biases.

  Args:
    stacked: from a regular expression, found in the paths of leaves that stack the
      parameters of several layers (`flax.linen.scan`, `flax.nnx.vmap`,
      ``equinox.filter_vmap``), to the axis or axes that number the layers. Filters
      of different layers are different filters.

  Returns:
    A `Layout`.

  >>> import jax.numpy as jnp
  >>> params = {'stem': {'kernel': jnp.ones((3, 8, 4))}}
  >>> automatic().unknown(params)
  ['stem/kernel']
  >>> automatic(stacked={'stem': 0}).leaves(params)
  [('stem/kernel', Leaf(is_weight=True, filter_axes=(0, 2)))]

  References:
    Li et al., Visualizing the loss landscape of neural nets, 2018, section 4
    (arXiv:1712.09913).
  """
  return Layout((_equinox_nn, _own_module, _flax), stacked or {})


def flax(*, stacked: Mapping[str, int | Shape] | None = None) -> Layout:
  """The layout of flax.linen and flax.nnx, by the names of leaves, whatever the tree.

  It is `automatic` without the classes of Equinox: give it for modules of one's own
  that hold their arrays as flax does, inputs before outputs.

  Args:
    stacked: regular expressions of paths and the axes that number stacked layers.

  Returns:
    A `Layout`.

  >>> import jax.numpy as jnp
  >>> flax().leaves({'query': {'kernel': jnp.ones((8, 2, 3))}})
  [('query/kernel', Leaf(is_weight=True, filter_axes=(1, 2)))]
  """
  return Layout((_flax,), stacked or {})


def equinox(*, stacked: Mapping[str, int | Shape] | None = None) -> Layout:
  """The layout of Equinox: the first axis numbers the filters.

  Leaves of `equinox.nn` are what their classes say, as with `automatic`. Arrays in
  modules of one's own, and in trees of dicts, hold outputs before inputs too if they
  have two or more axes and are not called bias or scale.

  Args:
    stacked: regular expressions of paths and the axes that number stacked layers. The
      modules of `equinox.nn` need it only for generic convolutions.

  Returns:
    A `Layout`.

  >>> import jax.numpy as jnp
  >>> equinox().leaves({'weight': jnp.ones((8, 3)), 'bias': jnp.ones((8, 1, 1))})
  [('bias', Leaf(is_weight=False, filter_axes=None)), \
('weight', Leaf(is_weight=True, filter_axes=(0,)))]
  """
  return Layout((_equinox_nn, _first_axis), stacked or {})


def last_axis() -> Layout:
  """Every leaf with two or more axes is a weight, and its last axis numbers filters.

  Names are not looked at: biases with two axes are weights too. It fits arrays without
  names, such as lists of matrices and kernels used as inputs times weights.

  Returns:
    A `Layout`.

  >>> import jax.numpy as jnp
  >>> last_axis().leaves([jnp.ones((3, 3, 2, 8))])
  [('0', Leaf(is_weight=True, filter_axes=(3,)))]
  """
  return Layout((_last_axis,))


def rule(function: Rule, otherwise: Layout | None = None) -> Layout:
  """A layout in which a function of your own decides before another layout does.

  Args:
    function: from a `Parameter` (``path``, ``shape``, ``bias``, ``module``) to a
      `Leaf`, or to None for leaves that it leaves to the other layout. Axes may count
      from the end.
    otherwise: the other layout, by default `automatic`.

  Returns:
    A `Layout`.

  >>> import jax.numpy as jnp
  >>> layout = rule(lambda p: Leaf(True, (0,)) if p.path.endswith('w_out') else None)
  >>> layout.leaves({'w_in': jnp.ones((3, 4)), 'w_out': jnp.ones((2, 4))})
  [('w_in', Leaf(is_weight=True, filter_axes=(1,))), \
('w_out', Leaf(is_weight=True, filter_axes=(0,)))]
  """
  otherwise = automatic() if otherwise is None else otherwise
  return dataclasses.replace(otherwise, rules=(function, *otherwise.rules))


def _equinox_nn(parameter: Parameter) -> Leaf | None:
  """Leaves of the modules of `equinox.nn`, by their classes."""
  module, ndim = parameter.module, len(parameter.shape)
  if _is_vector(parameter.path) or _is(module, *_NOT_WEIGHTS):
    return Leaf(False) if _is(module, 'Module') else None
  if _is(module, 'Conv', 'ConvTranspose'):
    base = module.num_spatial_dims + 2
  elif _is(module, *_MATRICES):
    base = 2
  else:
    return None
  if ndim < base:
    return Leaf(False)
  output = ndim - 1 if _is(module, 'Embedding') else ndim - base
  return Leaf(True, (*range(ndim - base), output))


def _own_module(parameter: Parameter) -> Leaf | None:
  """Arrays in Equinox modules of one's own, whose outputs may be anywhere."""
  if not _is(parameter.module, 'Module'):
    return None
  if _is_vector(parameter.path) or len(parameter.shape) < 2:
    return Leaf(False)
  found = _positions(parameter)
  return Leaf(True, found[0] if len(found) == 1 else None)


def _first_axis(parameter: Parameter) -> Leaf:
  if _is_vector(parameter.path) or len(parameter.shape) < 2:
    return Leaf(False)
  return Leaf(True, (0,))


def _last_axis(parameter: Parameter) -> Leaf:
  ndim = len(parameter.shape)
  return Leaf(True, (ndim - 1,)) if ndim >= 2 else Leaf(False)


def _flax(parameter: Parameter) -> Leaf:
  ndim = len(parameter.shape)
  if _is_vector(parameter.path) or ndim < 2:
    return Leaf(False)
  found = _positions(parameter)
  if len(found) == 1:
    return Leaf(True, found[0])
  by_name = _by_name(parameter.path, ndim)
  if not found:
    return Leaf(True, by_name)
  with_last = [axes for axes in found if ndim - 1 in axes]
  if by_name in with_last:
    return Leaf(True, by_name)
  sure = len(with_last) == 1 and not re.search(_NOT_LAST, parameter.path)
  return Leaf(True, with_last[0] if sure else None)


def _by_name(path: str, ndim: int) -> Shape | None:
  """Filter axes of a kernel without a bias."""
  *_, module, name = ('', '', *path.split('/'))
  before, last = tuple(range(ndim - 2)), ndim - 1
  if re.search(_NOT_LAST, path):
    return None
  if ndim == 2:
    return (1,)
  if name == 'embedding' or re.fullmatch(r'Dense_\d+', module):
    return (*before, last)
  if ndim == 3 and module in ('query', 'key', 'value'):
    return (1, 2)
  conv = re.search('conv', f'{module}/{name}', re.IGNORECASE)
  if (conv and not re.search(_STACKS, path)) or (ndim == 3 and module == 'out'):
    return (last,)
  return None


def _positions(parameter: Parameter) -> list[Shape]:
  """Where the sizes of the bias stand, in order, in the shape of a kernel."""
  bias, shape = parameter.bias, parameter.shape
  if not bias:
    return []
  return [
    axes
    for axes in itertools.combinations(range(len(shape)), len(bias))
    if tuple(shape[a] for a in axes) == bias
  ]


def _is_vector(path: str) -> bool:
  """Whether a leaf is called a bias, or the scale of a normalization."""
  return not {'bias', 'scale'}.isdisjoint(path.rsplit('/', 1)[-1].split('_'))


def _is(module: Any, *names: str) -> bool:
  """Whether a module is of one of these classes of Equinox, which is not imported."""
  return any(
    cls.__name__ in names and cls.__module__.split('.')[0] == 'equinox'
    for cls in type(module).__mro__
  )


def _sibling(path: str) -> str:
  return '/'.join([*path.split('/')[:-1], 'bias'])


def _parameters(params: Any) -> list[Parameter]:
  """Every leaf with its path, its shape and the Equinox module that holds it."""
  found = []
  for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    names = [_key(key) for key in keys]
    module, holder = None, params
    for key, name in zip(keys, names, strict=True):
      if _is(holder, 'Module'):
        module = holder
      if _is_box(holder):
        # The arrays of flax.nnx, and partitioned ones of flax.linen.
        names = names[:-1] if key is keys[-1] else names
        break
      holder = _child(holder, key, name)
    path = '/'.join(map(str, names))
    found.append(Parameter(path, np.shape(leaf), module=module))
  return found


def _key(key: Any) -> Any:
  """The name, key or index of an entry of a path."""
  named = (getattr(key, kind, None) for kind in ('name', 'key', 'idx'))
  return next((name for name in named if name is not None), key)


def _child(holder: Any, key: Any, name: Any) -> Any:
  """What an entry of a path leads to; None in a pytree that hides it."""
  if isinstance(key, jax.tree_util.GetAttrKey):
    return getattr(holder, name, None)
  if isinstance(key, (jax.tree_util.DictKey, jax.tree_util.SequenceKey)):
    return None if holder is None else holder[name]
  return None


def _is_box(holder: Any) -> bool:
  """Whether flax keeps one array in it, under another name of the path."""
  return any(
    cls.__name__ in ('Variable', 'AxisMetadata')
    and cls.__module__.split('.')[0] == 'flax'
    for cls in type(holder).__mro__
  )


def _normalized(axes: Shape, ndim: int, parameter: Parameter) -> set[int]:
  """Axes counted from the front."""
  if any(not -ndim <= axis < ndim for axis in axes):
    raise ValueError(
      f'layout: {parameter.path} of shape {parameter.shape} has no axes {axes}'
    )
  return {axis % ndim for axis in axes}
