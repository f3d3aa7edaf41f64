# One Outrider cluster: two nodes on two Nomad clients, one Consul. See README.md for the order of things.
#
#   nomad job run -var 'datacenters=["dc1"]' -var image=<image> outrider.nomad.hcl

variable "datacenters" {
  type        = list(string)
  default     = ["dc1"]
  description = "Where the nodes may run. One Outrider cluster belongs to one Consul datacenter."
}

variable "image" {
  type        = string
  default     = "outrider:0.1.0"
  description = "The container image; its entrypoint is the outrider command."
}

variable "cluster_name" {
  type        = string
  default     = "outrider"
  description = "The name that sys/health and the replication status show."
}

variable "consul_http_addr" {
  type        = string
  default     = "127.0.0.1:8500"
  description = "The Consul agent of the same machine, never a load balancer: the leader's lock lives by a check there."
}

variable "consul_path" {
  type        = string
  default     = "outrider/"
  description = "Prefix of every key in Consul. The policy in consul-acl-policy.hcl names it too."
}

job "outrider" {
  datacenters = var.datacenters
  type        = "service"
  priority    = 80

  constraint {
    attribute = "${attr.kernel.name}"
    value     = "linux"
  }

  group "node" {
    count = 2

    # Two nodes on one machine fail together, and the static ports would collide.
    constraint {
      operator = "distinct_hosts"
      value    = "true"
    }

    # A new version starts as one canary beside the old nodes, and needs a third client for that. It is unsealed by
    # hand, looked at, and then promoted by hand: which node leads must never be an accident of a deployment. Nobody
    # unseals in the middle of a night, so the deadlines are long.
    update {
      max_parallel      = 1
      canary            = 1
      auto_promote      = false
      auto_revert       = false
      health_check      = "checks"
      min_healthy_time  = "15s"
      healthy_deadline  = "2h"
      progress_deadline = "3h"
    }

    migrate {
      max_parallel     = 1
      health_check     = "checks"
      min_healthy_time = "15s"
      healthy_deadline = "2h"
    }

    # A crashed node comes back sealed; it is started again where it was, and its neighbour leads meanwhile.
    restart {
      attempts = 5
      interval = "10m"
      delay    = "5s"
      mode     = "delay"
    }

    network {
      mode = "host"

      port "http" {
        static = 8200
      }

      port "cluster" {
        static = 8201
      }
    }

    # Nomad's own catalog, for deployments only. In Consul the node registers itself: it alone knows whether it is
    # active, standing by or sealed. There is no check_restart, because a restart would only seal the node again.
    service {
      name     = "outrider"
      provider = "nomad"
      port     = "http"

      check {
        name            = "unsealed"
        type            = "http"
        protocol        = "https"
        tls_skip_verify = true
        path            = "/v1/sys/health?standbyok=true&drsecondarycode=200"
        interval        = "5s"
        timeout         = "3s"
      }
    }

    task "outrider" {
      driver = "docker"

      # SIGINT steps down and drains; the time covers both. Nomad clients cap it by max_kill_timeout, 30s by default.
      kill_signal  = "SIGINT"
      kill_timeout = "30s"

      config {
        image        = var.image
        network_mode = "host"
        ports        = ["http", "cluster"]
        args         = ["server", "-config=${NOMAD_TASK_DIR}/outrider.hcl"]
        cap_drop     = ["all"]
      }

      env {
        CONSUL_HTTP_ADDR = var.consul_http_addr

        # In memory: a key that has to pass through a file must not reach a disk.
        TMPDIR = "${NOMAD_SECRETS_DIR}"
      }

      template {
        destination = "local/outrider.hcl"
        change_mode = "noop"
        data        = <<-EOT
          cluster_name = "${var.cluster_name}"
          api_addr     = "https://{{ env "NOMAD_ADDR_http" }}"
          cluster_addr = "https://{{ env "NOMAD_ADDR_cluster" }}"
          log_format   = "json"

          storage "consul" {
            path       = "${var.consul_path}"
            token_file = "{{ env "NOMAD_SECRETS_DIR" }}/consul-token"
          }

          listener "tcp" {
            address         = "{{ env "NOMAD_ADDR_http" }}"
            cluster_address = "{{ env "NOMAD_ADDR_cluster" }}"
            tls_cert_file   = "{{ env "NOMAD_SECRETS_DIR" }}/api.crt"
            tls_key_file    = "{{ env "NOMAD_SECRETS_DIR" }}/api.key"
          }
        EOT
      }

      # The node reads a changed token by itself, and certificates again on SIGHUP: nothing here ever restarts it.
      template {
        destination = "secrets/consul-token"
        perms       = "0400"
        change_mode = "noop"
        data        = "{{ with nomadVar \"nomad/jobs/outrider\" }}{{ .consul_token }}{{ end }}"
      }

      template {
        destination   = "secrets/api.crt"
        perms         = "0400"
        change_mode   = "signal"
        change_signal = "SIGHUP"
        data          = "{{ with nomadVar \"nomad/jobs/outrider\" }}{{ .api_certificate }}{{ end }}"
      }

      template {
        destination   = "secrets/api.key"
        perms         = "0400"
        change_mode   = "signal"
        change_signal = "SIGHUP"
        data          = "{{ with nomadVar \"nomad/jobs/outrider\" }}{{ .api_key }}{{ end }}"
      }

      resources {
        cpu    = 500
        memory = 512
      }

      logs {
        max_files     = 5
        max_file_size = 20
      }
    }
  }
}
