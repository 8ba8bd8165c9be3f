"""Losses with kernels of their own: exact where their rules allow it, else refused."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax import curvature

AT = jnp.array([0.5, -1.0, 2.0])
FORWARD = jax.extend.core.Primitive('fused_attention_fwd')
FORWARD.def_impl(jnp.sin)
FORWARD.def_abstract_eval(lambda x: x)


def _kernel(forward):
  """The sine, whose value comes from elsewhere; its gradient is a rule on that."""
  kernel = jax.custom_vjp(lambda x: forward(x))

  def pull_back(residuals, cotangent):
    x, y = residuals
    return (cotangent * jnp.sign(jnp.cos(x)) * jnp.sqrt(1 - y**2),)

  kernel.defvjp(lambda x: (forward(x), (x, forward(x))), pull_back)
  return kernel


def _callback(x):
  return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


REFUSED = {
  'a primitive without a rule': _kernel(FORWARD.bind),
  'a callback': _kernel(_callback),
  'a kernel that calls another': _kernel(_kernel(jnp.sin)),
}


def _loss(kernel):
  return lambda params, batch: jnp.sum(batch * kernel(params))


def test_a_custom_rule_that_can_be_differentiated_is_exact():
  loss = _loss(_kernel(jnp.sin))
  operator = curvature.hessian(loss, AT, [jnp.ones(3)])
  product = operator.matvec(jnp.ones(3))
  np.testing.assert_allclose(product, -np.sin(AT), rtol=1e-6)


@pytest.mark.parametrize('name', REFUSED)
@pytest.mark.parametrize('cache', [0.0, 1.0])
def test_a_kernel_with_a_gradient_only_is_refused_with_a_sentence(name, cache):
  kernel = REFUSED[name]
  loss = _loss(kernel)
  operator = curvature.hessian(loss, AT, [jnp.ones(3)], max_cache_gib=cache)
  with pytest.raises(curvature.SecondDerivativeError) as raised:
    curvature.eigenpairs(operator, 1)
  sentence = str(raised.value)
  assert "implementation='xla'" in sentence and '\n' not in sentence


def test_pure_products_are_refused_too():
  kernel = REFUSED['a primitive without a rule']
  with pytest.raises(curvature.SecondDerivativeError, match='forward over reverse'):
    jax.jit(curvature.hessian_product(_loss(kernel)))(AT, jnp.ones(3), AT)
  with pytest.raises(curvature.SecondDerivativeError, match='fused_attention_fwd'):
    curvature.hvp(lambda w: jnp.sum(kernel(w)), AT, AT)


def test_other_errors_of_a_loss_come_out_as_they_are():
  def loss(params, batch):
    raise TypeError('the batch has no labels')

  operator = curvature.hessian(loss, AT, [jnp.ones(3)])
  with pytest.raises(TypeError, match='no labels') as raised:
    operator.matvec(AT)
  assert not isinstance(raised.value, curvature.SecondDerivativeError)
