"""Commands that cannot be, a hundred and more: one sentence that names the flag."""

import pytest

import eval_hessian
import train
from input_pipelines import DataError
from training import cli

_SAM = '--optimizer=sam'

# The last flag of each is at fault.
_TRAIN = """
--epochs=nan
--epochs=inf
--epochs=-1
--epochs=1.5
--epochs=
--batch_size=0
--batch_size=-4
--batch_size=1e3
--batch_size=99999
--learning_rate=inf
--learning_rate=-1
--learning_rate=
--learning_rate=abc
--optimizer=sam --rho=inf
--optimizer=sam --rho=
--optimizer=sam --rho=0.1,nan
--optimizer=SAM
--optimizer=sam,
--optimizer=adagrad
--optimizer=sgd,adam,foo
--base_optimizer=sam
--optimizer=sgd --base_optimizer=adam
--schedule=exponential
--schedule=Step
--warmup_epochs=-1
--warmup_epochs=nan
--warmup_epochs=100
--optimizer=momentum --momentum=1
--optimizer=momentum --momentum=-1
--optimizer=momentum --momentum=nan
--optimizer=sgd --momentum=.9
--optimizer=adam --momentum=.9
--weight_decay=-1
--weight_decay=nan
--label_smoothing=1
--label_smoothing=-.1
--label_smoothing=nan
--optimizer=sam --m_sharpness=7
--grad_accum_steps=0
--grad_accum_steps=-2
--grad_accum_steps=1.5
--grad_accum_steps=3
--optimizer=sam --m_sharpness=8 --grad_accum_steps=16
--track=hills
--track_every=5
--track_on=train
--track_share=0.2
--track=edges --track_every=-1
--track=edges --track_on=all
--track=edges --track_on=99999
--track=edges --track_share=1
--optimizer=sgd,sam --track=edges
--track=edges,edges
--track=edges,batch_sharpness --track_on=99999
--track=batch_sharpness --track_every=-1
--track=batch_sharpness --track_on=train
--track=batch_sharpness --track_share=0.1
--optimizer=msam --base_optimizer=momentum --track=batch_sharpness
--optimizer=esam --track=batch_sharpness
--optimizer=sam --m_sharpness=8 --track=batch_sharpness
--track=noise
--task=diabetes_mlp --optimizer=adam --track=noise
--task=diabetes_mlp --optimizer=sam --track=batch_sharpness,noise
--optimizer=sam --m_sharpness=-8
--optimizer=sam --m_sharpness=64
--m_sharpness=8
--optimizer=sam --perturb_every=0
--optimizer=sam --perturb_every=-2
--optimizer=sam --perturb_from=5 --perturb_until=2
--optimizer=sam --epochs=4 --perturb_until=5
--optimizer=sam --perturb_from=nan
--optimizer=sam --perturb_from=-1
--optimizer=sam --perturb_from=1000
--clip_norm=-1
--clip_norm=nan
--clip_norm=inf
--dtype=float16
--dtype=float64
--dtype=int8
--seed=1.5
--seed=abc
--split_seed=-1
--init_from=/nonexistent
--device_data_gib=-1
--device_data_gib=nan
--log_every=-1
--checkpoint_every=-1
--keep_checkpoints=-1
--optimizer=sam --num_ascent_steps=0
--optimizer=sam --num_ascent_steps=-1
--optimizer=sam --num_ascent_steps=1.5
--optimizer=sam --num_ascent_steps=1000000
--optimizer=asam --adaptive_eta=-1
--optimizer=asam --adaptive_eta=nan
--optimizer=asam --adaptive_eta=1e-60
--optimizer=asam --adaptive_rule=some
--optimizer=esam --esam_beta=0
--optimizer=esam --esam_beta=2
--optimizer=esam --esam_gamma=0
--optimizer=esam --esam_gamma=nan
--optimizer=friendly_sam --friendly_decay=1.5
--optimizer=friendly_sam --friendly_sigma=nan
--optimizer=graphsam --graphsam_beta=1
--optimizer=graphsam --graphsam_beta=-.1
--optimizer=graphsam --graphsam_gamma=-1
--optimizer=graphsam --graphsam_epochs=0
--optimizer=gsam --gsam_alpha=nan
--optimizer=gsam --gsam_alpha=1e60
--optimizer=gsam --gsam_rho_min=-1
--optimizer=looksam --looksam_every=0
--optimizer=looksam --looksam_alpha=inf
--optimizer=trace_sam --universal_lam=nan
--optimizer=trace_sam --num_probes=0
--optimizer=det_sam --det_half_width=0
--optimizer=det_sam --det_half_width=-1
--optimizer=wsam --wsam_gamma=1
--optimizer=wsam --wsam_gamma=-.5
--optimizer=sam --looksam_every=3
--optimizer=sam --esam_beta=.5
--seeds=-3
--seeds=abc
--seeds=2 --seed=2147483647
--measure=foo
--measure=
--measure=landscape
--measure=trace --measure_every=-1
--measure_every=5
--workdir=
--devices=-1
--process_id=1
--num_processes=0
--num_processes=2 --coordinator=host:99999
--coordinator=localhost:1234 --num_processes=2 --process_id=5
--coordinator=localhost:1234 --num_processes=2 --process_id=-1
--unknown_flag=1
--task=
--task=/nonexistent.py
--task=os
--task=json.tool
--task=/etc/passwd
--model=foo
--model=width=abc
--model=hidden=-1
--model=width=1,width=2
--model==
--model=width=
--sync_perturbation=3
--timing=maybe
--task=tudataset_gcn --dataset=../x
"""

_EVAL = """
--workdir=
--workdir=/nonexistent
--workdir=RUN/config.json
--workdir=/nonexistent/*
--workdir=RUN,
--workdir=/etc/passwd
--out=
--out=/etc/passwd
--out=RUN
--steps=abc
--steps=-1
--steps=7
--steps=0
--steps=40,all
--measure=foo
--measure=
--measure=line
--measure=layers,foo
--split=valid
--num_examples=-1
--num_examples=99999999
--num_examples=1.5
--operator=ggn
--params_regex=[
--params_regex=nomatch
--preconditioner=adam
--preconditioner=foo
--batch_norm=foo
--dtype=float16
--dtype=bfloat16
--tol=0
--tol=-1
--tol=nan
--tol=2
--max_num_matvecs=0
--max_num_matvecs=1
--max_basis_gib=0
--max_basis_gib=nan
--max_basis_gib=1e-9
--max_journal_gib=-1
--max_journal_gib=nan
--batch_size=0
--seed=-1
--top_k=0
--top_k=-1
--top_k=99999999
--num_matvecs=0
--num_matvecs=99999999
--num_probes=0
--num_probes=99999999999
--trace_matvecs=0
--trace_matvecs=1
--worst_case_rho=-1
--worst_case_rho=nan
--worst_case_norm=l1
--worst_case_group=0
--worst_case_steps=0
--average_case_sigma=-1
--average_case_sigma=nan
--average_case_sigma=inf
--average_case_samples=0
--average_case_samples=1
--one_batch_repeats=-1
--landscape_points=1
--landscape_points=-5
--landscape_points=100000
--landscape_extent=0
--landscape_extent=nan
--landscape_extent=-1
--landscape_extent=1e30
--landscape_directions=foo
--landscape_directions=trajectory
--landscape_directions=eigenvectors --landscape_biases
--eigen_ratio_points=1
--landscape_towards=/nonexistent
--landscape_towards=RUN
--unknown=1
"""


def _cases(text):
  return [pytest.param(line.split(), id=line) for line in text.split('\n') if line]


def _sentence(capsys, script, last):
  """Checks the one line on stderr: it names the flag, and is no quoted exception."""
  error = capsys.readouterr().err
  assert error.startswith(f'{script}: ') and error.count('\n') == 1, error
  assert last.partition('=')[0].strip('-s') in error  # --steps: 'step 7'.
  assert "('" not in error and 'Error' not in error
  return error


@pytest.mark.filterwarnings('default')
@pytest.mark.parametrize('flags', _cases(_TRAIN))
def test_train_refuses(flags, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  script = ['train.py', '--nocache', '--devices=1']
  assert cli.run(train.main, [*script, *flags], errors=(DataError,)) == 2
  _sentence(capsys, 'train.py', flags[-1])
  assert not list(tmp_path.iterdir())


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A run of one epoch."""
  workdir = tmp_path_factory.mktemp('refusals') / 'run'
  script = ['train.py', '--nocache', '--devices=1', f'--workdir={workdir}']
  assert cli.run(train.main, [*script, '--epochs=1']) == 0
  return workdir


@pytest.mark.filterwarnings('default')
@pytest.mark.parametrize('flags', _cases(_EVAL))
def test_eval_hessian_refuses(flags, trained, capsys):
  flags = [flag.replace('RUN', str(trained)) for flag in flags]
  script = ['eval_hessian.py', '--nocache', f'--workdir={trained}', *flags]
  capsys.readouterr()
  assert cli.run(eval_hessian.main, script, errors=(DataError,)) == 2
  _sentence(capsys, 'eval_hessian.py', flags[-1])
  assert not (trained / 'hessian' / 'summary.json').exists()
