"""Airflow (2.10 or 3): the nightly job, then the proof that the dataset is whole.

Set the Airflow variables clipfilter_source, clipfilter_out and clipfilter_policy. Credentials come from the environment of
the workers. clipfilter has a virtual environment of its own (CLIPFILTER_BIN, default /opt/venv/bin/clipfilter), since its
requirements and Airflow's need not agree.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta

try:
    from airflow.providers.standard.operators.bash import BashOperator
    from airflow.sdk import DAG
except ImportError:  # Airflow 2
    from airflow import DAG
    from airflow.operators.bash import BashOperator

BINARY = os.environ.get("CLIPFILTER_BIN", "/opt/venv/bin/clipfilter")
#: Values reach the shell as environment variables, so that nothing in them is read as a command.
PLACES = {
    "CLIPFILTER": BINARY,
    "SOURCE": "{{ var.value.clipfilter_source }}",
    "OUT": "{{ var.value.clipfilter_out }}",
    "POLICY": "{{ var.value.clipfilter_policy }}",
}

with DAG(
    dag_id="clipfilter_nightly",
    description="Process what is new, append it to the dataset, prove that nothing is missing",
    schedule="30 2 * * *",
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,  # a night takes everything that is new; there is nothing to make up for
    max_active_runs=1,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=10), "retry_exponential_backoff": True},
    tags=["clipfilter"],
) as dag:
    plan = BashOperator(
        task_id="plan",
        bash_command='"$CLIPFILTER" nightly "$SOURCE" --policy "$POLICY" --out "$OUT" --dry-run --json',
        env=PLACES,
        append_env=True,
        execution_timeout=timedelta(minutes=30),
    )
    # Repeating a night that was interrupted resumes it. Exit code 3 (drift, failures, silence) fails the task: the alert.
    night = BashOperator(
        task_id="night",
        bash_command='"$CLIPFILTER" nightly "$SOURCE" --policy "$POLICY" --out "$OUT" --json',
        env=PLACES,
        append_env=True,
        execution_timeout=timedelta(hours=12),
    )
    verify = BashOperator(
        task_id="verify",
        bash_command='"$CLIPFILTER" verify "$OUT" --json',
        env=PLACES,
        append_env=True,
        execution_timeout=timedelta(hours=4),
    )
    plan >> night >> verify
